"""GradDotProdTrainer against float64: every row that a run leaves, and the weights it ends with."""

import copy
import importlib.util
import inspect
import itertools
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import model_zoo
import numpy as np
import pyarrow.dataset
import pytest
import torch
import torch.nn.functional as F
from brute_force import tiny_gpt2
from datasets import Dataset
from graddot_lm import GraddotError
from graddot_lm.background import BackgroundWriter
from graddot_lm.hf import GradDotProdTrainer
from loop_steps import mapping_gradient, tiny_bert
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.utils.data import IterableDataset
from transformers import (
    BertForQuestionAnswering,
    DataCollatorWithFlattening,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LabelSmoother


def samples(n, *, seed, vocab=61, classes=0):
    """Token ids of several lengths; labels are the ids, or a class."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (n,), generator=g).tolist()
    ids = [torch.randint(1, vocab, (length,), generator=g).tolist() for length in lengths]
    return [{"input_ids": x, **({"label": sum(x) % classes} if classes else {})} for x in ids]


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n], mask[i, :n] = torch.tensor(row["input_ids"]), 1
    labels = ids.masked_fill(mask == 0, -100)
    if "label" in rows[0]:
        labels = torch.tensor([row["label"] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Snapshots(TrainerCallback):
    """The weights at which each optimizer step's gradients were taken."""

    def __init__(self):
        self.models, self.states = [], []

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        named = model.named_parameters()
        self.states.append({n: copy.deepcopy(optimizer.state.get(p)) for n, p in named})
        plain = copy.deepcopy(model)
        plain.__dict__.pop("forward", None)  # accelerate's, under autocast
        if hasattr(plain, "gradient_checkpointing_disable"):
            plain.gradient_checkpointing_disable()
        self.models.append(plain.double().train())


def arguments(folder, **kwargs):
    defaults = {
        "max_steps": 3,
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.02,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.3,
        "optim": "sgd",
        "weight_decay": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **kwargs})


# Transformers 5 has a strategy for what was a flag.
BY_LENGTH = {"group_by_length": True}
if "group_by_length" not in TrainingArguments.__dataclass_fields__:
    BY_LENGTH = {"train_sampling_strategy": "group_by_length"}

TRAIN, VAL = samples(20, seed=1), samples(5, seed=2)


def train(
    folder,
    model,
    data=TRAIN,
    val=VAL,
    *,
    resume=None,
    val_interval=1,
    adamw=False,
    collator=collate,
    **kwargs,
):
    snapshots = Snapshots()
    trainer = GradDotProdTrainer(
        model=model,
        args=arguments(folder, **kwargs),
        data_collator=collator,
        train_dataset=data,
        val_dataset=val,
        val_interval=val_interval,
        adamw=adamw,
        callbacks=[snapshots],
    )
    trainer.train(resume_from_checkpoint=resume)
    assert not any("forward" in m.__dict__ for m in list(model.modules())[1:])
    if adamw:
        return snapshots.models, snapshots.states, rows_of(folder / "scores")
    return snapshots.models, rows_of(folder / "scores")


def rows_of(path):
    return pyarrow.dataset.dataset(path).to_table().to_pylist()


def sample_gradient(model, data, i):
    return mapping_gradient(model, collate([data[i]]))


def flat(gradient):
    return torch.cat([g.flatten() for g in gradient.values()])


def tokens(data, i):
    return 1 if "label" in data[i] else len(data[i]["input_ids"]) - 1


def brute_force(model, data, val, ids, direction_model=None):
    """Dots, (N,), their scales, and what clipping to 0.3 multiplies the step's gradient by."""
    direction = flat(mapping_gradient(direction_model or model, collate(val)))
    own = [flat(sample_gradient(model, data, i)) for i in ids]
    dots = torch.stack([direction @ g for g in own])
    scales = torch.stack([direction.norm() * g.norm() for g in own])
    return dots, scales, own


def clipping(own, weights):
    norm = torch.stack([w * g for w, g in zip(weights, own, strict=True)]).sum(0).norm().item()
    return min(1.0, 0.3 / norm)


def test_norms_have_columns(tmp_path, close):
    GradDotProdTrainer(
        model=tiny_gpt2(),
        args=arguments(tmp_path, max_steps=1),
        data_collator=collate,
        train_dataset=TRAIN,
        val_dataset={"a": VAL},
        engine_options={"norms": True},
    ).train()
    rows = rows_of(tmp_path)
    dots, scales, own = brute_force(tiny_gpt2(), TRAIN, VAL, [row["sample_id"] for row in rows])
    close(torch.tensor([row["norm"] for row in rows]), torch.stack([g.norm() for g in own]), 1e-5)
    cosines = torch.tensor([row["cosine_a"] for row in rows])
    close(cosines, dots / scales, 1e-5, torch.full_like(dots, 10))


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, [6] * 3),
        ({"gradient_checkpointing": True}, [6] * 3),
        ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, [6] * 3),
        ({"max_steps": -1, "num_train_epochs": 2}, [6, 6, 6, 2] * 2),
        ({"max_steps": 4, "dataloader_drop_last": True, "dataloader_num_workers": 1}, [6] * 4),
        (BY_LENGTH, [6] * 3),
    ],
    ids=["", "checkpointing", "compiled", "whole-epochs", "drop-last", "by-length"],
)
def test_every_row_and_the_weights(tmp_path, close, options, sizes):
    """`sizes` are the samples of every step: an epoch may end in one micro-batch, of two of them."""
    model, regular = tiny_gpt2(), tiny_gpt2()
    models, rows = train(tmp_path / "scored", model, **options)
    Trainer(
        model=regular,
        args=arguments(tmp_path / "regular", **options),
        data_collator=collate,
        train_dataset=TRAIN,
    ).train()
    for (name, p), q in zip(model.named_parameters(), regular.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6), name
    assert [row["step"] for row in rows] == [k for k, n in enumerate(sizes) for _ in range(n)]
    for step, (snapshot, size) in enumerate(zip(models, sizes, strict=True)):
        at = [row for row in rows if row["step"] == step]
        ids = [row["sample_id"] for row in at]
        assert len(set(ids)) == size and [row["n_tokens"] for row in at] == [
            tokens(TRAIN, i) for i in ids
        ]
        dots, scales, own = brute_force(snapshot, TRAIN, VAL, ids)
        column = lambda name, at=at: torch.tensor([row[name] for row in at], dtype=torch.float64)
        close(column("dot"), dots, 1e-5, scales)
        weights = torch.tensor([tokens(TRAIN, i) for i in ids], dtype=torch.float64)
        weights /= weights.sum()
        lr = 0.02 * (1 - step / len(sizes))
        assert column("lr").tolist() == pytest.approx([lr] * size)
        clip = clipping(own, weights)
        assert clip < 1
        close(column("value"), lr * clip * weights * dots, 1e-4, lr * clip * weights * scales)


class Masking:
    """A collator that leaves labels out at random."""

    def __init__(self, by):
        self.by, self.own = by, np.random.default_rng(3)

    def __call__(self, rows):
        batch = collate(rows)
        draw = {
            "torch": torch.rand,
            "numpy": np.random.random,
            "python": lambda shape: [[random.random() for _ in range(shape[1])] for _ in rows],
            "its-own": self.own.random,
        }[self.by]
        batch["labels"][torch.as_tensor(draw(tuple(batch["labels"].shape))) < 0.2] = -100
        return batch


class Drawing(nn.Embedding):
    """Draws numbers of which nothing comes, as layers do that may be dropped."""

    def forward(self, x):
        np.random.random(), random.random()
        return super().forward(x)


@pytest.mark.parametrize("by", ["torch", "numpy", "python", "its-own"])
def test_random_numbers_of_training_are_those_without_scores(tmp_path, by):
    """Those of dropout, of a collator that masks and of the order by length; and the validation
    batches of a run that resumes, masked at random, are those it had."""

    def trainer(cls, **kwargs):
        model = tiny_gpt2()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.2
        model.transformer.wte.__class__ = Drawing
        options = {"max_steps": -1, "num_train_epochs": 2, **BY_LENGTH}
        args = arguments(tmp_path / cls.__name__, **options)
        return cls(model=model, args=args, data_collator=Masking(by), train_dataset=TRAIN, **kwargs)

    regular = trainer(Trainer)
    regular.train()
    scored = trainer(GradDotProdTrainer, val_dataset=VAL)  # a trainer that is made sets the seed
    scored.train()
    parameters = regular.model.parameters()
    for (name, p), q in zip(scored.model.named_parameters(), parameters, strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6), name
    again = trainer(GradDotProdTrainer, val_dataset=VAL)
    torch.rand(1), np.random.random(1), random.random()
    for got, want in zip(*(x._validation_batches("val") for x in (again, scored)), strict=True):
        assert torch.equal(got["labels"], want["labels"])


def masked(rows):
    """A batch for a masked language model: some tokens are labels, none of some rows."""
    batch = collate(rows)
    batch["labels"][batch["input_ids"] % 4 > 0] = -100
    return batch


def modern_bert():
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0, embedding_dropout=0, mlp_dropout=0,
    )  # fmt: skip
    return model_zoo.shaken(ModernBertForMaskedLM(config))


# A model, its collator, and what Trainer makes of micro-batches' mean losses where it accumulates.
ACCUMULATED = {
    "classifier": (tiny_bert, collate, "sum"),  # takes num_items_in_batch and ignores it
    "encoder-decoder": (model_zoo.t5, collate, "sum"),
    "masked": (modern_bert, masked, "mean over tokens"),  # is divided by it
    "takes-no-number": (lambda: Own(OUTPUTS["tuple"]), collate, "mean"),
    "told-to-divide": (tiny_bert, collate, "mean"),
}


@pytest.mark.parametrize("kind", ACCUMULATED)
def test_what_trainer_makes_of_accumulated_losses(tmp_path, close, kind):
    """Weights are its, and values those of its steps; the last has micro-batches of three and two."""
    make, collator, whole = ACCUMULATED[kind]
    classes = 3 if make is tiny_bert else 0
    data, val = samples(11, seed=1, classes=classes), samples(5, seed=2, classes=classes)
    runs, snapshots = {}, Snapshots()
    for cls in (Trainer, GradDotProdTrainer):
        own = {"val_dataset": val} if cls is GradDotProdTrainer else {}
        if own and kind == "takes-no-number":
            own["engine_options"] = {"label_shift": 1}
        args = arguments(tmp_path / cls.__name__, max_steps=4, remove_unused_columns=False)
        trainer = runs[cls] = cls(
            model=make().double(), args=args, data_collator=collator, train_dataset=data, **own
        )
        if kind == "told-to-divide":
            trainer.loss_is_scaled_for_ga = False
    if kind == "told-to-divide" and not hasattr(Trainer, "loss_is_scaled_for_ga"):
        pytest.skip("this version's Trainer cannot be told")
    runs[GradDotProdTrainer].add_callback(snapshots)
    for trainer in runs.values():
        trainer.train()
    if whole == "sum" and not runs[Trainer].model_accepts_loss_kwargs:
        whole = "mean"  # with a version in which the model does not take the number
    trained, regular = (runs[cls].model for cls in (GradDotProdTrainer, Trainer))
    for (name, p), q in zip(trained.named_parameters(), regular.parameters(), strict=True):
        assert (p - q).norm() <= 1e-9 * q.norm() + 1e-12, name

    def gradient(model, rows):
        loss = model(**collator(rows))[0]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])

    rows = rows_of(tmp_path / "GradDotProdTrainer" / "scores")
    states = [*snapshots.models, trained]
    for step, (model, after) in enumerate(itertools.pairwise(states)):
        at = [row for row in rows if row["step"] == step]
        count = torch.tensor([float(row["n_tokens"]) for row in at]).double()
        micros = count.split(3)
        weights = torch.cat([own / own.sum() for own in micros])
        if whole != "sum":
            weights = weights / len(micros) if whole == "mean" else count / count.sum()
        direction = gradient(model, val)
        own = [
            gradient(model, [data[row["sample_id"]]]) if row["n_tokens"] else 0 * direction
            for row in at
        ]
        dots = torch.stack([direction @ g for g in own])
        scales = torch.stack([direction.norm() * g.norm() for g in own])
        column = lambda name, at=at: torch.tensor([row[name] for row in at], dtype=torch.float64)
        close(column("dot"), dots, 1e-6, scales)
        factor = 0.02 * (1 - step / 4) * weights * clipping(own, weights)
        close(column("value"), factor * dots, 1e-5, factor * scales)
        moved = [
            (p - q).detach().flatten()
            for p, q in zip(model.parameters(), after.parameters(), strict=True)
        ]
        change = direction @ torch.cat(moved)  # of the validation loss, to first order
        assert column("value").sum().item() == pytest.approx(change.item(), rel=1e-6)


@pytest.mark.skipif(
    "num_items_in_batch" not in inspect.signature(LabelSmoother.__call__).parameters,
    reason="older versions divide by each micro-batch's own tokens: refused, see test_refusals",
)
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_label_smoothing(tmp_path, close, kind):
    """Of the training loss, which Trainer then computes; the validation loss is the model's own."""
    classes = 3 if kind == "bert" else 0
    data, val = samples(20, seed=1, classes=classes), samples(5, seed=2, classes=classes)
    make = tiny_gpt2 if classes == 0 else lambda: tiny_bert().float()
    options = {"label_smoothing_factor": 0.1, "remove_unused_columns": False, "max_steps": 2}
    model, regular = make(), make()
    models, rows = train(tmp_path / "scored", model, data, val, **options)
    trainer = Trainer(
        model=regular,
        args=arguments(tmp_path / "regular", **options),
        data_collator=collate,
        train_dataset=data,
    )
    trainer.train()
    for (name, p), q in zip(model.named_parameters(), regular.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6), name

    def own_gradient(model, i):
        exact, batch = copy.deepcopy(model).double(), collate([data[i]])
        labels = batch.pop("labels")
        logits = exact(**batch).logits
        if not classes:
            logits, labels = logits[0, :-1], labels[0, 1:]
        F.cross_entropy(logits, labels, label_smoothing=0.1).backward()
        return flat({n: p.grad for n, p in exact.named_parameters()})

    for step, snapshot in enumerate(models):
        at = [row for row in rows if row["step"] == step]
        direction = flat(mapping_gradient(snapshot, collate(val)))
        own = [own_gradient(snapshot, row["sample_id"]) for row in at]
        dots = torch.stack([direction @ g for g in own])
        scales = torch.stack([direction.norm() * g.norm() for g in own])
        weights = [tokens(data, row["sample_id"]) for row in at]
        assert [row["n_tokens"] for row in at] == weights
        column = lambda name, at=at: torch.tensor([row[name] for row in at], dtype=torch.float64)
        close(column("dot"), dots, 1e-5, scales)
        weights = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        factor = 0.02 * (1 - step / 2) * weights * clipping(own, weights)
        close(column("value"), factor * dots, 1e-4, factor * scales)


def test_noise_on_embeddings(tmp_path, close, monkeypatch):
    """NEFTune's, here the same number everywhere: in training only, so the checks may draw others."""
    rows = train(tmp_path / "random", tiny_gpt2(), neftune_noise_alpha=5.0)[1]
    assert len(rows) == 18 and all(row["dot"] for row in rows)  # the checks are not misled
    model = tiny_gpt2()
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda x, low, high: x.fill_(0.3 * high))
    options = {"neftune_noise_alpha": 50.0, "max_steps": 2, "per_device_train_batch_size": 1}
    models, rows = train(tmp_path / "constant", model, **options)
    for step, snapshot in enumerate(models):
        at = [row for row in rows if row["step"] == step]
        embedding = snapshot.transformer.wte
        direction = flat(mapping_gradient(snapshot.eval(), collate(VAL)))

        def noisy(module, args, out):
            return out + 0.3 * 50.0 / (out.shape[1] * out.shape[2]) ** 0.5

        embedding._forward_hooks.clear()
        embedding.register_forward_hook(noisy)
        own = [flat(sample_gradient(snapshot, TRAIN, row["sample_id"])) for row in at]
        dots = torch.stack([direction @ g for g in own])
        scales = torch.stack([direction.norm() * g.norm() for g in own])
        got = torch.tensor([row["dot"] for row in at], dtype=torch.float64)
        close(got, dots, 1e-5, scales)


class ScheduleFree(torch.optim.SGD):
    """Has other weights in the model while it is evaluated."""

    shift = 0.0

    def _shift_to(self, shift):
        for group in self.param_groups:
            for p in group["params"]:
                p.data += shift - self.shift
        self.shift = shift

    def train(self):
        self._shift_to(0.0)

    def eval(self):
        self._shift_to(0.05)


def test_weights_of_a_schedule_free_optimizer(tmp_path, close):
    """The validation gradient after an evaluation is that at the weights that are trained."""
    model, states = tiny_gpt2(), []

    class Trained(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            states.append(copy.deepcopy(trainer.model.state_dict()))

    trainer = GradDotProdTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1),
        data_collator=collate,
        train_dataset=TRAIN,
        eval_dataset=VAL,
        callbacks=[Trained()],
        optimizers=(ScheduleFree(model.parameters(), lr=0.02), None),
    )
    trainer.train()
    rows = [row for row in rows_of(tmp_path / "scores") if row["step"] == 1]
    model.load_state_dict(states[0])
    dots, scales, _ = brute_force(model, TRAIN, VAL, [row["sample_id"] for row in rows])
    close(torch.tensor([row["dot"] for row in rows], dtype=torch.float64), dots, 1e-5, scales)


def test_targets_and_interval(tmp_path, close):
    vals = {"a": VAL[:1], "b": VAL}
    data = Dataset.from_list([{**sample, "text": "not for the model"} for sample in TRAIN])
    models, rows = train(tmp_path, tiny_gpt2(), data, vals, val_interval=2)
    for step, snapshot in enumerate(models):
        at = [row for row in rows if row["step"] == step]
        ids = [row["sample_id"] for row in at]
        for name, val in vals.items():
            direction_model = models[step - step % 2]
            dots, scales, _ = brute_force(snapshot, TRAIN, val, ids, direction_model)
            got = torch.tensor([row[f"dot_{name}"] for row in at], dtype=torch.float64)
            close(got, dots, 1e-5, scales)


def test_scores_for_adamw(tmp_path, close):
    """The derivative of the next step around a gradient of zero, entry by entry."""
    options = {"optim": "adamw_torch", "adamw": True, "val_interval": 2}
    models, states, rows = train(tmp_path, tiny_gpt2(), **options)
    assert {row["step"] for row in rows} == {1, 2}
    for step in (1, 2):
        at = [row for row in rows if row["step"] == step]
        direction = mapping_gradient(models[step - step % 2], collate(VAL))
        for name, state in states[step].items():
            t = state["step"].item() + 1
            second = state["exp_avg_sq"].double() * 0.999 / (1 - 0.999**t)
            slope = 0.1 / (1 - 0.9**t) / (second.sqrt() + 1e-8)
            direction[name] *= torch.where(second > 0, slope, 0)
        own = [flat(sample_gradient(models[step], TRAIN, row["sample_id"])) for row in at]
        dots = torch.stack([flat(direction) @ g for g in own])
        scales = torch.stack([flat(direction).norm() * g.norm() for g in own])
        close(torch.tensor([row["dot"] for row in at], dtype=torch.float64), dots, 1e-4, scales)


def test_bf16(tmp_path, record_property, monkeypatch):
    """Scores within 2e-2 of their Cauchy-Schwarz scale, as in 16 bit elsewhere."""
    # Transformers 4 sets it for whatever trains later in this process; this is undone after the test.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    models, rows = train(tmp_path, tiny_gpt2(), bf16=True, max_steps=1)
    dots, scales, _ = brute_force(models[0], TRAIN, VAL, [row["sample_id"] for row in rows])
    got = torch.tensor([row["dot"] for row in rows], dtype=torch.float64)
    error = ((got - dots).abs() / scales).max().item()
    record_property("relative_error", error)
    assert 0 < error <= 2e-2


def test_values_are_those_without_a_gradient_scaler(tmp_path, close):
    """Two steps of it, whose scale grows in between."""
    values = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**9, growth_interval=1)):
        folder = tmp_path / f"{len(values)}"
        trainer = scored(folder, tiny_gpt2(), max_steps=2, max_grad_norm=0.0)
        trainer.accelerator.scaler = scaler
        trainer.train()
        rows = rows_of(folder / "scores")
        values.append(torch.tensor([row["value"] for row in rows], dtype=torch.float64))
    assert scaler.get_scale() == 2.0**11
    close(values[1], values[0], 1e-4)


def test_what_16_bits_round_is_not_refused(tmp_path, monkeypatch):
    """The model's outputs are compared without autocast, which accelerate has in its forward."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    models, rows = train(tmp_path, model_zoo.t5().float().train(), bf16=True, max_steps=1)
    dots, scales, _ = brute_force(models[0].eval(), TRAIN, VAL, [row["sample_id"] for row in rows])
    got = torch.tensor([row["dot"] for row in rows], dtype=torch.float64)
    assert ((got - dots).abs() / scales).max() <= 2e-2


def test_resumed_run_has_every_row_once(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    _, whole = train(tmp_path / "whole", tiny_gpt2(), **options)
    train(tmp_path / "cut", tiny_gpt2(), **options)
    checkpoint = str(tmp_path / "cut" / "checkpoint-2")
    _, resumed = train(tmp_path / "cut", tiny_gpt2(), resume=checkpoint, **options)
    assert [(r["step"], r["sample_id"]) for r in resumed] == [
        (r["step"], r["sample_id"]) for r in whole
    ]
    for got, want in zip(resumed, whole, strict=True):
        assert got["dot"] == pytest.approx(want["dot"], rel=1e-4, abs=1e-6)
    with pytest.raises(GraddotError, match="holds the scores of an earlier run"):
        train(tmp_path / "cut", tiny_gpt2(), **options)


def test_rows_of_steps_that_are_not_taken_again_are_dropped(tmp_path):
    """Where a run that went on is taken up from a checkpoint, to end there."""
    options = {"save_strategy": "steps", "save_steps": 4}  # an epoch
    train(tmp_path, tiny_gpt2(), max_steps=6, **options)
    checkpoint = str(tmp_path / "checkpoint-4")
    _, rows = train(tmp_path, tiny_gpt2(), max_steps=4, resume=checkpoint, **options)
    assert {row["step"] for row in rows} == {0, 1, 2, 3}


@pytest.mark.parametrize("when", ["on_pre_optimizer_step", "on_substep_end"])
def test_an_interrupted_trainer_goes_on(tmp_path, monkeypatch, when):
    """The same one, as in a notebook: nothing of the step that was cut off is in its values."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    _, whole = train(tmp_path / "whole", tiny_gpt2(), **options)
    trainer = scored(tmp_path / "cut", tiny_gpt2(), **options)

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("graddot_lm.hf._ScoreCallback." + when, interrupt)
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    rows = rows_of(tmp_path / "cut" / "scores")
    assert [row["sample_id"] for row in rows] == [row["sample_id"] for row in whole]
    for got, want in zip(rows, whole, strict=True):
        assert got["value"] == pytest.approx(want["value"], rel=1e-4, abs=1e-8)


def test_an_epoch_that_ends_in_the_midst_of_a_step_is_refused(tmp_path):
    class Ends(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step == 1

    trainer = scored(tmp_path, tiny_gpt2(), max_steps=6)  # of two epochs
    trainer.add_callback(Ends())
    with pytest.raises(
        GraddotError, match="an epoch was stopped after 1 of step 1's micro-batches"
    ):
        trainer.train()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TRAIN)


def test_rows_are_saved_before_the_checkpoint_that_counts_on_them(tmp_path, monkeypatch):
    saved = []

    def save(self, *_):
        saved.append((self.state.global_step, len(rows_of(tmp_path))))

    monkeypatch.setattr(Trainer, "_save_checkpoint", save)
    train(tmp_path, tiny_gpt2(), save_strategy="steps", save_steps=1)
    assert saved == [(1, 6), (2, 12), (3, 18)]


def test_rows_are_saved_every_so_often(tmp_path, monkeypatch):
    """Also where no checkpoint is: a run that is killed leaves what was saved."""
    monkeypatch.setattr("graddot_lm.hf._SAVED_EVERY", 2)

    class Killed(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    trainer = scored(tmp_path, tiny_gpt2(), max_steps=6)
    trainer.add_callback(Killed())
    flush, saved = BackgroundWriter.flush, []

    def noted(self, wait=True):
        flush(self)  # waits, for the count
        saved.append(len(rows_of(tmp_path / "scores")))

    monkeypatch.setattr(BackgroundWriter, "flush", noted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert saved[:2] == [12, 20]  # an epoch ends with a smaller step


def test_refusals(tmp_path, monkeypatch):
    def make(data=TRAIN, val=VAL, model=None, **kwargs):
        own = {k: kwargs.pop(k) for k in ("compute_loss_func", "model_init") if k in kwargs}
        args = arguments(tmp_path, **kwargs)
        model = None if "model_init" in own else model or tiny_gpt2()
        return GradDotProdTrainer(
            model=model, args=args, train_dataset=data, val_dataset=val, **own
        )

    with pytest.raises(GraddotError, match="val_dataset is None"):
        make(val=None)
    with pytest.raises(GraddotError, match="iterable training set"):
        make(data=Stream())
    with monkeypatch.context() as patch:
        patch.setattr(LabelSmoother, "__call__", lambda self, output, labels: None)
        with pytest.raises(GraddotError, match="label_smoothing_factor in this version"):
            make(label_smoothing_factor=0.1)
    with pytest.raises(GraddotError, match="compute_loss_func"):
        make(compute_loss_func=lambda *args, **kwargs: None)
    for version, offload, reason in [
        (1, None, 'FSDP of version 1; pass fsdp_config={"version": 2}'),
        (2, CPUOffloadPolicy(), "FSDP and cpu_offload"),
        (2, None, "FSDP and torch_compile"),
    ]:
        plugin = SimpleNamespace(fsdp_version=version, cpu_offload=offload)
        with monkeypatch.context() as patch, pytest.raises(GraddotError, match=re.escape(reason)):
            patch.setattr(GradDotProdTrainer, "_fsdp", lambda self, plugin=plugin: plugin)
            make(torch_compile="compile" in reason, torch_compile_backend="eager")
    with pytest.raises(GraddotError, match="model_init"):
        make(model_init=lambda: tiny_gpt2())
    with pytest.raises(GraddotError, match="optimizer is a SGD"):  # which never has a state
        train(tmp_path, tiny_gpt2(), adamw=True)


def scored(folder, model, *, cls=GradDotProdTrainer, collator=collate, options=None, **kwargs):
    """A trainer of TRAIN and VAL."""
    return cls(
        model=model,
        args=arguments(folder, **{"remove_unused_columns": False, **kwargs}),
        data_collator=collator,
        train_dataset=TRAIN,
        val_dataset=VAL,
        engine_options=options,
    )


class HalfLoss(GradDotProdTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        return 0.5 * super().compute_loss(model, inputs, **kwargs)


class FromLogits(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class MixedIn(GradDotProdTrainer, FromLogits):
    pass


class OwnLossAgain(GradDotProdTrainer, FromLogits):
    compute_loss = Trainer.compute_loss


def test_a_loss_of_the_users_own_is_refused(tmp_path):
    with pytest.raises(GraddotError, match="compute_loss of its own, HalfLoss.compute_loss"):
        scored(tmp_path, tiny_gpt2(), cls=HalfLoss)
    with pytest.raises(GraddotError, match="compute_loss of its own, FromLogits.compute_loss"):
        scored(tmp_path, tiny_gpt2(), cls=MixedIn)
    trainer = scored(tmp_path, tiny_gpt2())
    trainer.compute_loss = lambda model, inputs, **kwargs: 0.5 * model(**inputs).loss
    with pytest.raises(GraddotError, match="compute_loss of its own, .*lambda"):
        trainer.train()
    trainer = scored(tmp_path, tiny_gpt2())
    trainer.compute_loss_func = lambda outputs, labels, **kwargs: 0.5 * outputs.loss
    with pytest.raises(GraddotError, match="compute_loss_func"):
        trainer.train()
    assert not any((tmp_path / "scores").glob("part-*"))


def test_the_models_loss_in_place_of_the_users_own(tmp_path, close):
    scored(tmp_path, tiny_gpt2(), cls=OwnLossAgain, max_steps=1).train()
    rows = rows_of(tmp_path / "scores")
    dots, scales, _ = brute_force(tiny_gpt2(), TRAIN, VAL, [row["sample_id"] for row in rows])
    close(torch.tensor([row["dot"] for row in rows], dtype=torch.float64), dots, 1e-5, scales)


class Own(nn.Module):
    """What it returns is made of (loss, logits)."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head, self.form = nn.Embedding(61, 8), nn.Linear(8, 61), form

    def forward(self, input_ids, attention_mask, labels):
        logits = self.head(self.embedding(input_ids).tanh())
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return self.form(loss, logits)


class HeadByHand(Own):
    """Reads the head's weight behind its layer's back, so that its own forward is followed."""

    def forward(self, input_ids, attention_mask, labels):
        hidden = F.dropout(self.embedding(input_ids).tanh(), 0.2, self.training)
        logits = F.linear(hidden, self.head.weight)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return loss, logits


def test_a_model_that_is_followed_draws_once(tmp_path):
    """Its first step, whose forward runs outside of the step and again, has the same dropout."""
    options = {"remove_unused_columns": False, "max_steps": 2}
    model, regular = (HeadByHand(None) for _ in range(2))
    scored(tmp_path / "scored", model, options={"label_shift": 1}, **options).train()
    args = arguments(tmp_path / "regular", **options)
    Trainer(model=regular, args=args, data_collator=collate, train_dataset=TRAIN).train()
    for (name, p), q in zip(model.named_parameters(), regular.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6), name


OUTPUTS = {
    "tuple": lambda loss, logits: (loss, logits),
    "list": lambda loss, logits: [loss, logits],
    "dict": lambda loss, logits: {"logits": logits, "loss": loss},
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("form", OUTPUTS)
def test_models_that_return_other_forms(tmp_path, close, form, accumulation):
    model, snapshots = Own(OUTPUTS[form]), Snapshots()
    trainer = scored(
        tmp_path,
        model,
        max_steps=2,
        options={"label_shift": 1},
        gradient_accumulation_steps=accumulation,
    )
    trainer.add_callback(snapshots)
    trainer.train()
    rows = rows_of(tmp_path / "scores")
    for step, snapshot in enumerate(snapshots.models):
        at = [row for row in rows if row["step"] == step]
        assert len(at) == 3 * accumulation
        plain = snapshot.double()
        plain.form = lambda loss, _: loss

        def own(data, plain=plain):
            return torch.autograd.grad(plain(**collate(data)), list(plain.parameters()))

        direction = torch.cat([g.flatten() for g in own(VAL)])
        samples = [torch.cat([g.flatten() for g in own([TRAIN[row["sample_id"]]])]) for row in at]
        scales = torch.stack([direction.norm() * g.norm() for g in samples])
        dots = torch.stack([direction @ g for g in samples])
        got = torch.tensor([row["dot"] for row in at], dtype=torch.float64)
        close(got, dots, 1e-5, scales)


class LossLast(NamedTuple):
    total: torch.Tensor
    loss: torch.Tensor


def test_models_without_a_loss_are_refused(tmp_path):
    forms = {
        "tuple without a loss": lambda loss, logits: (logits, loss),
        "dict without a loss": lambda loss, logits: {"logits": logits},
        "Tensor without a loss": lambda loss, logits: logits,
        "LossLast whose loss is not its first item": lambda loss, _: LossLast(2 * loss, loss),
    }
    for message, form in forms.items():
        with pytest.raises(GraddotError, match=message):
            scored(tmp_path, Own(form), options={"label_shift": 1}).train()


def test_a_loss_that_is_not_tracked_is_refused(tmp_path, monkeypatch):
    """Under accumulation it would halve every dot."""
    trainer = scored(tmp_path, tiny_gpt2())
    monkeypatch.setattr("graddot_lm.loss_scale.LossScale.factors", lambda self: [])
    with pytest.raises(GraddotError, match="loss trained on is not one that the model returned"):
        trainer.train()


@pytest.mark.parametrize("flash", [False, True], ids=["", "flash-lengths"])
def test_padding_free_batches(tmp_path, close, flash):
    """Rows and weights as if each sample had a row; an epoch ends in a batch of one, an ordinary
    row. A sample without tokens is in no batch."""
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=flash, return_seq_idx=flash)
    data = [*TRAIN[:3], {"input_ids": []}, *TRAIN[3:10]]
    options = {"max_steps": 4, "remove_unused_columns": False, "bf16": False}
    model, regular = tiny_gpt2(), tiny_gpt2()
    models, rows = train(
        tmp_path / "scored",
        model,
        data,
        collator=collator,
        per_device_train_batch_size=5,
        **options,
    )
    Trainer(
        model=regular,
        args=arguments(tmp_path / "regular", per_device_train_batch_size=5, **options),
        data_collator=collator,
        train_dataset=data,
    ).train()
    for (name, p), q in zip(model.named_parameters(), regular.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6), name
    for step, snapshot in enumerate(models):
        at = [row for row in rows if row["step"] == step]
        ids = [row["sample_id"] for row in at]
        assert 3 not in ids and [row["n_tokens"] for row in at] == [tokens(data, i) for i in ids]
        dots, scales, own = brute_force(snapshot, data, VAL, ids)
        column = lambda name, at=at: torch.tensor([row[name] for row in at], dtype=torch.float64)
        close(column("dot"), dots, 1e-5, scales)
        weights = torch.tensor([tokens(data, i) for i in ids], dtype=torch.float64)
        weights /= weights.sum()
        factor = column("lr") * clipping(own, weights) * weights
        close(column("value"), factor * dots, 1e-4, factor * scales)
    assert len(rows) == 20  # two epochs of all samples that have tokens


class Reversed(DataCollatorWithFlattening):
    def __call__(self, features, **kwargs):
        return super().__call__(features[::-1], **kwargs)


def with_mask(rows):
    batch = DataCollatorWithFlattening()(rows)
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def test_padding_free_batches_that_cannot_be_scored_are_refused(tmp_path):
    def refused(message, collator, **kwargs):
        with pytest.raises(GraddotError, match=message):
            scored(tmp_path, tiny_gpt2(), collator=collator, **kwargs).train()

    message = "1 rows of 3 dataset items, and not one in which their input_ids lie one after"
    refused(message, DataCollatorWithFlattening(return_position_ids=False))
    refused(message, Reversed())
    refused("need norms=False", DataCollatorWithFlattening(), options={"norms": True})
    refused("gets an input .* only without an attention_mask", with_mask)
    # The validation batches alone
    refused("gets an input .* only without", with_mask, per_device_train_batch_size=1)


def test_targets_that_are_not_in_labels_are_refused(tmp_path):
    def spans(rows):
        batch = collate(rows)
        ends = batch.pop("labels")[:, 0] % 4
        return {**batch, "start_positions": ends - ends % 2, "end_positions": ends}

    config = tiny_bert().config
    config.num_labels = 2  # a span's start and end
    trainer = scored(tmp_path, BertForQuestionAnswering(config), collator=spans)
    with pytest.raises(GraddotError, match='no "labels", but start_positions, end_positions'):
        trainer.train()


def test_example(tmp_path):
    path = Path(__file__).parent.parent / "python" / "examples" / "hf_trainer.py"
    spec = importlib.util.spec_from_file_location("hf_trainer", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    run = ["--output_dir", str(tmp_path), "--max_steps", "8", "--width", "16"]
    means = example.main(run)
    assert list(means) == list(example.KINDS) and len(rows_of(tmp_path / "scores")) == 8 * 32
