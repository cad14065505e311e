"""A cell of the grid in test_grid.py: a model, its rows, the brute force, and a step's comparisons."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from brute_force import lm_loss, tiny_gpt2, token_batch, total
from graddot_lm import GradDotProdEngine, fuse_head
from model_zoo import (
    VOCAB,
    Convolutions2d,
    SharedLayers,
    TimeFirst,
    bert,
    causal,
    lora,
    moe,
    opt,
    shaken,
    t5,
    vit,
)
from torch import nn

TOLERANCE = 1e-5  # as in engine_steps.py, with the denominator explained there
TOLERANCE_16_BIT = 2e-2  # of the Cauchy-Schwarz scale
GRADIENT_16_BIT = 3e-2  # of the norm; regular training of Mixtral in bf16 is 2.1e-2 off
IGNORE = {"labels": -100}

# Rows by number. Those that go together without padding have one length.
TRAIN, MORE, SHORT, LONG = [0, 1, 2, 3], [4, 5], [6, 7, 8], [9]
VAL, OTHER_VAL, SHORT_VAL = [10, 11], [12], [13]
LENGTHS = [9] * 6 + [6] * 3 + [11] + [9] * 3 + [5]
FILL = {"input_ids": 0, "attention_mask": 0}


@dataclass(frozen=True)
class Subject:
    """A model, the kind of its rows, and by how many tokens its loss shifts the labels."""

    build: Callable[[], nn.Module]
    rows: str = "tokens"  # or "images"
    label_shift: int = 0
    plain: bool = False  # its loss is computed outside, and its batches are tensors
    vocab: int = VOCAB

    def row(self, number):
        """One row as a batch of one."""
        g = torch.Generator().manual_seed(number)
        if self.rows == "images":
            key = "x" if self.plain else "pixel_values"
            size = (3, 9, 9) if self.plain else (3, 8, 8)
            x, y = torch.randn(1, *size, generator=g), torch.randint(0, 5, (1,), generator=g)
            return {key: x, "labels": y}
        length = LENGTHS[number]
        ids, labels = token_batch(1, length, self.vocab, seed=number)
        if number % 3 == 1:  # ragged
            labels[0, length - 2 :] = labels[0, 1] = -100
        return {"input_ids": ids, "labels": labels}

    def batch(self, numbers, *, mask=False):
        """Rows as the engine is given them: inputs and labels; filled up and with a mask, or of
        one length."""
        rows = [self.row(i) for i in numbers]
        longest = max(row["labels"].shape[-1] for row in rows)
        if mask:
            for row in rows:
                row["attention_mask"] = torch.ones_like(row["input_ids"])
                for key, x in row.items():
                    row[key] = F.pad(x, (0, longest - x.shape[1]), value={**FILL, **IGNORE}[key])
        batch = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
        if self.plain:
            return next(iter(batch.values())), batch["labels"]
        return batch, None

    def loss(self, model, inputs, labels, track=lambda loss: loss):
        """The loss as a training loop has it."""
        if not self.plain:
            return model(**inputs).loss
        return track(self.loss_of_logits(model(inputs).float(), labels))

    def loss_of_logits(self, logits, labels):
        if self.label_shift:
            return lm_loss(logits, labels)
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def fused_gpt2():
    return fuse_head(tiny_gpt2())


def grouped(kind, **settings):
    return moe(kind, experts_implementation="grouped_mm", num_experts_per_tok=2, **settings)


CAUSAL = {"label_shift": 1}
SUBJECTS = {
    "gpt2": Subject(tiny_gpt2, **CAUSAL),
    "gpt2-fused-head": Subject(fused_gpt2, **CAUSAL),
    "llama": Subject(lambda: causal("Llama"), **CAUSAL),
    "qwen2": Subject(lambda: causal("Qwen2"), **CAUSAL),
    "mistral": Subject(lambda: causal("Mistral", sliding_window=8), **CAUSAL),
    "gemma": Subject(lambda: causal("Gemma"), **CAUSAL),
    "gpt-neox": Subject(lambda: causal("GPTNeoX"), **CAUSAL),
    "opt": Subject(opt, **CAUSAL),
    "phi": Subject(lambda: causal("Phi"), **CAUSAL),
    "lora": Subject(lora, **CAUSAL),
    "mixtral": Subject(lambda: grouped("Mixtral", num_local_experts=4), **CAUSAL),
    "gpt-oss": Subject(lambda: grouped("GptOss", num_local_experts=4), **CAUSAL),
    "bert": Subject(bert),
    "t5": Subject(t5),
    "vit": Subject(vit, rows="images"),
    "conv2d": Subject(lambda: shaken(Convolutions2d()), rows="images", plain=True),
    "shared-layers": Subject(SharedLayers, plain=True, vocab=30, **CAUSAL),
    "nn.Transformer": Subject(lambda: shaken(TimeFirst()), plain=True, vocab=30, **CAUSAL),
}

# By (model, loop): why there is no such cell.
NOT_POSSIBLE = {
    ("vit", "padding"): "images have no padding",
    ("conv2d", "padding"): "images have no padding",
    ("shared-layers", "padding"): "it takes no mask",
    ("nn.Transformer", "padding"): "it takes no mask",
}
if int(transformers.__version__.split(".")[0]) < 5:  # where its experts are layers of their own
    NOT_POSSIBLE["mixtral", "compiled"] = "its mixtures run uncompiled in between"


# The brute force


def exact(model):
    """A float64 copy on a CPU; experts by the implementation of transformers that has float64."""
    copied = copy.deepcopy(model).cpu().double()
    for part in copied.modules():
        if hasattr(getattr(part, "config", None), "_experts_implementation"):
            part.config._experts_implementation = "eager"
    return copied


class BruteForce:
    """Gradients of some rows of a subject, each by itself, in float64."""

    def __init__(self, subject, model, numbers):
        self.subject = subject
        self.gradients, self.counts = {}, {}
        model = exact(model)
        for number in numbers:
            row = subject.row(number)
            labels = row.pop("labels")
            if hasattr(model, "prepare_decoder_input_ids_from_labels"):
                row["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
            if subject.plain:
                logits = model(*(x.double() if x.is_floating_point() else x for x in row.values()))
            else:
                row = {k: x.double() if x.is_floating_point() else x for k, x in row.items()}
                logits = model(**row).logits
            model.zero_grad()
            subject.loss_of_logits(logits, labels).backward()
            self.gradients[number] = {
                n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for n, p in model.named_parameters()
                if p.requires_grad
            }
            shifted = labels[:, subject.label_shift :] if labels.dim() > 1 else labels
            self.counts[number] = int((shifted != -100).sum())

    def gradient(self, numbers):
        """Of the mean over the labelled tokens of these rows, by parameter."""
        whole = sum(self.counts[i] for i in numbers)
        return {
            name: sum(self.counts[i] / whole * self.gradients[i][name] for i in numbers)
            for name in self.gradients[numbers[0]]
        }

    def dots(self, val, train):
        """By parameter, (N,), and their Cauchy-Schwarz scales."""
        direction, own = self.gradient(val), [self.gradients[i] for i in train]
        dots = {n: torch.stack([(d * g[n]).sum() for g in own]) for n, d in direction.items()}
        scales = {
            n: torch.stack([d.norm() * g[n].norm() for g in own]) for n, d in direction.items()
        }
        return dots, scales


@functools.cache
def prepared(name):
    """A subject's model, the modes of its modules, and the brute force; not to be changed."""
    model = SUBJECTS[name].build()
    return model, BruteForce(SUBJECTS[name], model, range(len(LENGTHS)))


# One cell


class Cell:
    """A subject's model in a loop, with what the steps are compared with. `called` is what the loop
    calls: the model, or something around it."""

    def __init__(self, name, record, device="cpu"):
        self.subject, self.device = SUBJECTS[name], device
        original, self.want = prepared(name)
        self.model = self.called = copy.deepcopy(original).to(device)
        self.record, self.tolerance = record, TOLERANCE
        self.engine = None

    def batch(self, numbers, *, mask=False):
        """Rows as the engine is given them, on the model's device."""
        on = lambda x: x if x is None else x.to(self.device)
        inputs, labels = self.subject.batch(numbers, mask=mask)
        if isinstance(inputs, dict):
            return {key: on(x) for key, x in inputs.items()}, on(labels)
        return on(inputs), on(labels)

    def attach(self, val=None, optimizer=None, *, mask=False, **options):
        """A new engine; val are row numbers, or several by target, that ride along."""
        batch = functools.partial(self.batch, mask=mask)
        if self.engine is not None:
            self.engine.detach()
        data = None
        if val is not None:
            of_target = lambda v: b if (b := batch(v))[1] is not None else b[0]
            data = (
                {k: of_target(v) for k, v in val.items()}
                if isinstance(val, dict)
                else of_target(val)
            )
        shift = self.subject.label_shift if self.subject.plain else "auto"
        self.engine = GradDotProdEngine(
            self.model, data, per_parameter=True, label_shift=shift, padding=FILL if mask else None,
            **options,
        )  # fmt: skip
        self.engine.attach(optimizer)
        return self.engine

    def direct(self, val, **options):
        """Give the engine the gradient of val, one batch a row."""
        batches = [self.batch([i]) for i in val]
        loss = lambda model, x, y: self.subject.loss(model, x, y)
        plain = self.subject.plain
        self.engine.set_directions(
            self.engine.compute_directions(
                batches if plain else [b for b, _ in batches], loss if plain else None, **options
            )
        )

    def loss(self, train, step=0, *, mask=False):
        """Announce rows and run the forward."""
        x, y = self.batch(train, mask=mask)
        self.engine.attach_train_batch(x, y, step, torch.tensor(train))
        inputs, labels = self.engine.prepare_forward_input(x, y)
        return self.subject.loss(self.called, inputs, labels, self.engine.track_loss)

    def step(self, train, step=0, *, factor=1.0, mask=False):
        (self.loss(train, step, mask=mask) * factor).backward()
        self.engine.prepare_gradients()

    def check_scores(self, val, train, want=None):
        """Of all rows since the last time: every parameter's dots, and their sum."""
        by_parameter, scores = self.engine.parameter_dots(), self.engine.aggregate_and_log()
        targets = list(val.values()) if isinstance(val, dict) else [val]
        for k, rows in enumerate(targets):
            one = lambda x, k=k: x[k] if isinstance(val, dict) else x
            dots, scales = (want or self.want).dots(rows, train)
            assert set(by_parameter) == set(dots), "every trainable parameter is scored"
            self.close(one(scores), total(dots), total(scales))
            # A gradient that is zero but for rounding (softmax ignores key biases) has no direction.
            noise = 1e-3 * max(scale.max() for scale in scales.values())
            for name, dot in by_parameter.items():
                self.close(one(dot), dots[name], scales[name] + noise, name)

    def check_norms(self, targets, train):
        """Of the training rows and of each target's; of the cosines 1 is the scale."""
        whole = lambda gradient: torch.cat([g.flatten() for g in gradient.values()])
        own = torch.stack([whole(self.want.gradients[i]) for i in train])
        val = torch.stack([whole(self.want.gradient(rows)) for rows in targets])
        norms, val_norms, engine = own.norm(dim=1), val.norm(dim=1), self.engine
        self.close(engine.gradient_norms(), norms, norms)
        self.close(torch.atleast_1d(engine.target_norms()), val_norms, val_norms)
        cosines = val @ own.t() / val_norms[:, None] / norms
        self.close(torch.atleast_2d(engine.cosines()), cosines, torch.full_like(cosines, 10))

    def close(self, got, want, scale, name=None):
        """A parameter's dots, or all of them together, which alone are meaningful in 16 bit."""
        exactly = self.tolerance == TOLERANCE
        if not exactly and name is not None:
            return
        bound = torch.maximum(want.abs(), 0.1 * scale) if exactly else scale
        error = ((got.double().cpu() - want).abs() / bound).max().item()
        if name is None:
            self.record("relative_error", error)
        assert error <= self.tolerance, f"{name or 'scores'}: {error:.1e}"

    def check_gradient(self, want):
        """.grad against the training gradient, by parameter; as a whole in 16 bit."""
        if isinstance(want, list):
            want = self.want.gradient(want)
        grads = {
            n: (torch.zeros_like(p) if p.grad is None else p.grad).double().cpu()
            for n, p in self.model.named_parameters()
            if p.requires_grad
        }
        if self.tolerance == TOLERANCE:
            whole = torch.stack([g.norm() for g in want.values()]).norm()
            for n, g in grads.items():
                error = (g - want[n]).norm() / (want[n].norm() + 1e-2 * whole)
                assert error <= TOLERANCE, f".grad of {n}: {error:.1e}"
        else:
            got = torch.cat([g.flatten() for g in grads.values()])
            exact = torch.cat([want[n].flatten() for n in grads])
            assert (got - exact).norm() <= GRADIENT_16_BIT * exact.norm()
