"""GradDotProdTrainer on two processes: rows, values and weights of one process with all rows."""

import os

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from brute_force import tiny_gpt2
from graddot_lm.store import _parts
from loop_steps import tiny_bert
from process_group import on_processes
from test_hf import (
    VAL,
    arguments,
    brute_force,
    clipping,
    collate,
    rows_of,
    samples,
    tokens,
    train,
)
from transformers import DataCollatorWithFlattening, Trainer

WORLD, STEPS = 2, 3
MODELS = {"gpt2": tiny_gpt2, "bert": lambda: tiny_bert().float()}
DATA = {  # 24 rows: whole steps
    "gpt2": (samples(24, seed=1), VAL),
    "bert": (samples(24, seed=1, classes=3), samples(5, seed=2, classes=3)),
}


def run(rank, world, folder, model, options, collator=collate):
    """What torchrun sets for a process, and a run of the Trainer in it."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost"
    )
    for state in (AcceleratorState, GradientState, PartialState):  # the parent's, after a fork
        state._reset_state()
    trained = MODELS[model]()
    options = {**options, "per_device_train_batch_size": 2, "collator": collator}
    models = train(folder, trained, *DATA[model], **options)[0]
    return [snapshot.state_dict() for snapshot in models], dict(trained.named_parameters())


def own_counts(data, rows):
    return torch.tensor([tokens(data, row["sample_id"]) for row in rows], dtype=torch.float64)


def tokens_by_trainer(folder, model, data, rows):
    """What Trainer divides by: of some models, labels before or after the shift, by its version."""
    trainer = Trainer(model=model, args=arguments(folder / "count"), data_collator=collate)
    batch = collate([data[row["sample_id"]] for row in rows])
    return trainer._get_num_items_in_batch([batch], torch.device("cpu"))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "kind",
    ["gpt2", "bert", "gpt2-own-tokens", "gpt2-checkpointing", "gpt2-compiled", "gpt2-padding-free"],
)
def test_two_processes_equal_one(tmp_path, close, kind, accumulation):
    """A clipped SGD run; own-tokens: each process divides by the number of its own tokens."""
    name = kind.split("-")[0]
    data, snapshot = DATA[name], MODELS[name]()
    own = "own-tokens" in kind
    options = {
        "gradient_accumulation_steps": accumulation,
        "average_tokens_across_devices": not own,
        "gradient_checkpointing": "checkpointing" in kind,
        "remove_unused_columns": kind != "bert",
        "torch_compile": "compiled" in kind,
        "torch_compile_backend": "aot_eager" if "compiled" in kind else None,
    }
    collator = DataCollatorWithFlattening() if "padding-free" in kind else collate
    run_with = tmp_path / "scored", name, options, collator
    results = on_processes(WORLD, tmp_path / "two", run, *run_with)
    for n, p in results[0][1].items():
        assert torch.equal(p, results[1][1][n]), "the processes hold one model"
    if not own:
        regular = MODELS[name]()
        options["per_device_train_batch_size"] = 2 * WORLD
        trainer = Trainer(
            model=regular,
            args=arguments(tmp_path / "regular", **options),
            data_collator=collate,
            train_dataset=data[0],
        )
        if (
            name == "bert"
        ):  # whose loss is a mean, whatever it is passed; Trainer believes otherwise
            trainer.model_accepts_loss_kwargs = False
        trainer.train()
        for n, p in regular.named_parameters():
            assert (results[0][1][n] - p).norm() <= 1e-5 * p.norm() + 1e-7, n
    parts = _parts(tmp_path / "scored" / "scores")
    assert [(p.first, p.last, p.rank, p.world) for p in parts] == [(0, 2, 0, 2), (0, 2, 1, 2)]
    by_rank = [rows_of(part.path) for part in parts]
    for step, state in enumerate(results[0][0]):
        snapshot.load_state_dict(state)
        rows = [[row for row in rank if row["step"] == step] for rank in by_rank]
        by_process, rows = rows, [row for rank in rows for row in rank]
        counts = [own_counts(data[0], rank) for rank in by_process]
        assert len({row["sample_id"] for row in rows}) == 2 * WORLD * accumulation == len(rows)
        dots, scales, own_grads = brute_force(snapshot, *data, [row["sample_id"] for row in rows])
        column = lambda key, rows=rows: torch.tensor([r[key] for r in rows], dtype=torch.float64)
        close(column("dot"), dots, 1e-5, scales)
        weights = torch.cat(counts) / torch.cat(counts).sum()
        if own:
            totals = [tokens_by_trainer(tmp_path, snapshot, data[0], rank) for rank in by_process]
            weights = torch.cat([n / m / WORLD for n, m in zip(counts, totals, strict=True)])
        lr = 0.02 * (1 - step / STEPS)
        factor = lr * clipping(own_grads, weights) * weights
        close(column("value"), factor * dots, 1e-4, factor * scales)


def test_resumed_run_has_every_row_once(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    for folder in ("whole", "cut"):
        on_processes(WORLD, tmp_path / f"{folder}-1", run, tmp_path / folder, "gpt2", options)
    again = {**options, "resume": str(tmp_path / "cut" / "checkpoint-2")}
    on_processes(WORLD, tmp_path / "cut-2", run, tmp_path / "cut", "gpt2", again)
    whole, resumed = (
        sorted(rows_of(tmp_path / folder / "scores"), key=lambda r: (r["step"], r["sample_id"]))
        for folder in ("whole", "cut")
    )
    assert len(whole) == 4 * 8
    for got, want in zip(resumed, whole, strict=True):
        assert (got["step"], got["sample_id"]) == (want["step"], want["sample_id"])
        assert got["dot"] == pytest.approx(want["dot"], rel=1e-4, abs=1e-6)
