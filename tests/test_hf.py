"""GradDotProdTrainer against float64: every row that a run leaves, and the weights it ends with."""

import copy
import importlib.util
import inspect
import itertools
import random
from pathlib import Path

import model_zoo
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from brute_force import tiny_gpt2
from datasets import Dataset
from graddot_lm.hf import GradDotProdTrainer
from hf_runs import (
    BY_LENGTH,
    OUTPUTS,
    TRAIN,
    VAL,
    Own,
    Snapshots,
    arguments,
    brute_force,
    clipping,
    collate,
    flat,
    rows_of,
    sample_gradient,
    samples,
    scored,
    tokens,
    train,
)
from loop_steps import mapping_gradient, tiny_bert
from torch import nn
from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_pt_utils import LabelSmoother


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
    uncompiled = {k: v for k, v in options.items() if "compile" not in k}
    Trainer(
        model=regular,
        args=arguments(tmp_path / "regular", **uncompiled),
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


def test_example(tmp_path):
    path = Path(__file__).parent.parent / "python" / "examples" / "hf_trainer.py"
    spec = importlib.util.spec_from_file_location("hf_trainer", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    run = ["--output_dir", str(tmp_path), "--max_steps", "24", "--width", "16"]
    figures = example.main(run)
    assert len(rows_of(tmp_path / "scores")) == 24 * 32
    assert figures["dot_addition"] > max(figures["dot_subtraction"], figures["dot_noise"])
    assert figures["additions_chosen"] > 0.5 and figures["loss_best"] < figures["loss_random"]
