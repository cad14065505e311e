"""GradDotProdTrainer on two processes: rows, values, and Trainer's weights."""

import os
import time
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from brute_force import tiny_gpt2
from datasets import Dataset
from graddot_lm.background import BackgroundWriter
from graddot_lm.hf import content_id
from graddot_lm.store import _parts
from hf_runs import (
    VAL,
    Snapshots,
    Stream,
    arguments,
    brute_force,
    check_steps,
    clipping,
    collate,
    rows_of,
    samples,
    tokens,
    train,
)
from loop_steps import tiny_bert
from process_group import on_processes
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import DataCollatorWithFlattening, Trainer

WORLD, STEPS = 2, 3
BLOCKS = {"gpt2": "GPT2Block", "bert": "BertLayer"}
MODELS = {"gpt2": tiny_gpt2, "bert": lambda: tiny_bert().float()}
MODELS |= {"stream": tiny_gpt2, "hub-stream": tiny_gpt2}
ODD, EVEN = samples(21, seed=1), samples(20, seed=1)
DATA = {  # 24 rows: whole steps
    "gpt2": (samples(24, seed=1), VAL),
    "bert": (samples(24, seed=1, classes=3), samples(5, seed=2, classes=3)),
    "stream": (Stream(ODD), VAL),
    "hub-stream": (Dataset.from_list(EVEN).to_iterable_dataset(num_shards=2), VAL),
}


def shard_on_cpus():
    """Have accelerate heed an FSDP plugin, which it passes over on CPUs."""
    init = AcceleratorState.__init__

    def heeding(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = heeding


def sharded(name):
    config = {"version": 2, "transformer_layer_cls_to_wrap": [BLOCKS[name]]}
    return {"fsdp": True, "fsdp_config": config}


def weights(model):
    """Whole ones, if it is sharded."""
    named = dict(model.named_parameters()).items()
    return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in named}


class WholeWeights(Snapshots):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.models.append({n: p.detach().clone() for n, p in weights(model).items()})


def as_by_torchrun(rank, world):
    """What torchrun sets for a process."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost"
    )
    for state in (AcceleratorState, GradientState, PartialState):  # the parent's, after a fork
        state._reset_state()
    shard_on_cpus()


def run_scored(rank, world, folder, model, options, collator=collate):
    """A run of GradDotProdTrainer in a process; options are those of both Trainers."""
    as_by_torchrun(rank, world)
    trained, options = MODELS[model](), {"per_device_train_batch_size": 2, **options}
    with mock.patch("hf_runs.Snapshots", WholeWeights):
        states = train(folder, trained, *DATA[model], **options, collator=collator)[0]
    assert isinstance(trained, FSDPModule) == ("fsdp" in options)
    return states, weights(trained), options


def run(rank, world, folder, model, options, collator=collate):
    """And one of Trainer."""
    states, trained, options = run_scored(rank, world, folder, model, options, collator)
    regular = MODELS[model]()
    train_plainly(folder.with_name("plain"), regular, DATA[model][0], options, collator)
    return states, trained, weights(regular)


def train_plainly(folder, model, data, options, collator=collate):
    """Uncompiled, which needs no time for what is Trainer's own."""
    args = arguments(folder, **{k: v for k, v in options.items() if "compile" not in k})
    Trainer(model=model, args=args, data_collator=collator, train_dataset=data).train()


def same_weights(got, want):
    for n, p in want.items():
        assert (got[n] - p).norm() <= 1e-5 * p.norm() + 1e-7, n


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
    [
        "gpt2", "bert", "gpt2-own-tokens", "bert-own-tokens", "gpt2-checkpointing", "gpt2-compiled",
        "gpt2-padding-free",
        "gpt2-sharded", "bert-sharded", "gpt2-sharded-own-tokens", "gpt2-sharded-checkpointing",
    ],
)  # fmt: skip
def test_two_processes(tmp_path, close, kind, accumulation):
    """A clipped SGD run; own-tokens: each process divides by the number of its own tokens. Weights are
    those of Trainer on two processes, and, where it divides by the tokens of all, on one."""
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
    if "sharded" in kind:
        options.update(sharded(name))
    collator = DataCollatorWithFlattening() if "padding-free" in kind else collate
    run_with = tmp_path / "scored", name, options, collator
    results = on_processes(WORLD, tmp_path / "two", run, *run_with)
    for n, p in results[0][1].items():
        assert torch.equal(p, results[1][1][n]), "the processes hold one model"
    same_weights(results[0][1], results[0][2])
    if name == "gpt2" and not own:
        regular = MODELS[name]()
        options = {k: v for k, v in options.items() if k not in sharded(name)}
        options["per_device_train_batch_size"] = 2 * WORLD
        train_plainly(tmp_path / "regular", regular, data[0], options, collator)
        same_weights(results[0][1], dict(regular.named_parameters()))
    parts = _parts(tmp_path / "scored" / "scores")
    assert [(p.first, p.last, p.rank, p.world) for p in parts] == [(0, 2, 0, 2), (0, 2, 1, 2)]
    by_rank = [rows_of(part.path) for part in parts]
    for step, state in enumerate(results[0][0]):
        snapshot.load_state_dict(state, strict=False)  # the head is tied
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
        if name == "bert":  # whose losses are means of two, and Trainer adds them up
            weights = torch.full_like(weights, 1 / 2 if not own else 1 / 2 / WORLD)
        lr = 0.02 * (1 - step / STEPS)
        factor = lr * clipping(own_grads, weights) * weights
        close(column("value"), factor * dots, 1e-4, factor * scales)


def collate_alike(rows):
    """To one length, as accelerate dispatches batches."""
    return {
        k: F.pad(x, (0, 12 - x.shape[1]), value=-100 * (k == "labels"))
        for k, x in collate(rows).items()
    }


@pytest.mark.parametrize(
    ("name", "items", "options"),
    [
        ("stream", ODD, {}),
        ("hub-stream", EVEN, {"accelerator_config": {"dispatch_batches": False}}),
    ],
    ids=["dispatched", "sharded"],
)
def test_streams(tmp_path, close, name, items, options):
    """Over more than an epoch. The dispatched one is filled up with its first samples; the other ends in
    the midst of a step."""
    options = {"max_steps": 4, "gradient_accumulation_steps": 2, **options}
    run_with = tmp_path / "scored", name, options, collate_alike
    results = on_processes(WORLD, tmp_path / "two", run, *run_with)
    same_weights(results[0][1], results[0][2])
    models = []
    for state in [*results[0][0], results[0][1]]:
        models.append(tiny_gpt2().double())
        models[-1].load_state_dict(state, strict=False)  # the head is tied
    rows = rows_of(tmp_path / "scored" / "scores")
    by_id = {content_id(item): item for item in items}
    assert check_steps(models, rows, by_id, VAL, close) == 4
    assert {row["sample_id"] for row in rows} == by_id.keys()  # of the first epoch


def saved_late(rank, world, folder):
    """How many rows there are when each process comes to save the checkpoint; the last is slow."""
    flush, counts = BackgroundWriter.flush, []

    def slow(self, wait=True):
        time.sleep(rank if wait else 0)
        flush(self, wait=wait)

    def save(self, *_):
        counts.append(len(rows_of(folder / "scores")))

    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    with (
        mock.patch.object(BackgroundWriter, "flush", slow),
        mock.patch.object(Trainer, "_save_checkpoint", save),
    ):
        run_scored(rank, world, folder, "gpt2", options)
    return counts[0]


def test_rows_of_all_are_saved_before_a_checkpoint(tmp_path):
    counts = on_processes(WORLD, tmp_path / "two", saved_late, tmp_path / "scored")
    assert counts == [2 * 2 * 4] * WORLD


@pytest.mark.parametrize("further", [{}, sharded("gpt2")], ids=["", "sharded"])
def test_resumed_run_has_every_row_once(tmp_path, further):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **further}
    options["optim"] = "adamw_torch"  # SGD has no state, which FSDP cannot load
    folder = tmp_path / "run"

    def in_order():
        return sorted(rows_of(folder / "scores"), key=lambda r: (r["step"], r["sample_id"]))

    on_processes(WORLD, tmp_path / "whole", run_scored, folder, "gpt2", options)
    whole = in_order()
    again = {**options, "resume": str(folder / "checkpoint-2")}
    results = on_processes(WORLD, tmp_path / "again", run_scored, folder, "gpt2", again)
    assert [len(states) for states, *_ in results] == [2] * WORLD, "steps that were taken again"
    assert len(whole) == 4 * 8
    for got, want in zip(in_order(), whole, strict=True):
        assert (got["step"], got["sample_id"]) == (want["step"], want["sample_id"])
        assert got["dot"] == pytest.approx(want["dot"], rel=1e-4, abs=1e-6)
