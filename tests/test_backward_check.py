"""What mixes samples in the backward alone is refused; hooks and functions that do not are scored."""

import graddot_lm
import pytest
import torch
import torch.nn.functional as F
from brute_force import sample_dots, tiny_gpt2, token_batch, total
from graddot_lm import GraddotError, GradDotProdEngine
from graddot_lm.checks import backward_check
from torch import nn
from torch.utils.checkpoint import checkpoint


class AddAuxiliaryLoss(torch.autograd.Function):
    """The value as it is; its backward adds the gradient of a loss."""

    @staticmethod
    def forward(ctx, x, loss):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.ones((), dtype=grad.dtype)


class OtherRowsGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + 1e-3 * grad.roll(1, 0)


class OtherTokensGradient(OtherRowsGradient):
    @staticmethod
    def backward(ctx, grad):
        return grad + 1e-2 * grad.roll(5, 1)


def hooked(x, hook):
    if x.requires_grad:
        x.register_hook(hook)
    return x


def normalised_over_batch(x):
    return hooked(x, lambda grad: grad / grad.norm())


def normalised_by_row(x):
    size = lambda grad: 1e-3 + grad.flatten(1).norm(dim=1)[:, None, None]
    return hooked(x, lambda grad: grad / size(grad))


class ClippedGradient(OtherRowsGradient):
    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-1e-5, 1e-5)


def stopped_mean(x):
    mean = x.mean(0, keepdim=True)
    return x + (mean - mean.detach())


def stopped_mean_of_tokens(x):
    mean = x.mean(1, keepdim=True)
    return x + (mean - mean.detach())


MIXING = {
    "auxiliary-loss": lambda x: AddAuxiliaryLoss.apply(x, (x.mean((0, 1)) ** 2).sum()),
    "other-rows": OtherRowsGradient.apply,
    "norm-of-the-batch": normalised_over_batch,
    "stopped-mean": stopped_mean,
}
APART = {
    "reversed": lambda x: hooked(x, lambda grad: -0.5 * grad),
    "no-nan": lambda x: hooked(x, torch.nan_to_num),
    "detached-mean": lambda x: x + x.detach().mean(1, keepdim=True),
    "checkpoint": lambda x: checkpoint(torch.tanh, x, use_reentrant=False),
    "reentrant": lambda x: checkpoint(torch.tanh, x, use_reentrant=True),
}

BY_SIZE = {
    "norm-of-the-row": normalised_by_row,
    "clipped": ClippedGradient.apply,
    "clipped-by-a-hook": lambda x: hooked(x, lambda grad: grad.clamp(-1e-5, 1e-5)),
}


class Between(nn.Module):
    """A function between two layers of a block's MLP."""

    def __init__(self, inner, function):
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x):
        return self.function(self.inner(x))


def model_with(function, dtype=torch.float64):
    model = tiny_gpt2().to(dtype)
    block = model.transformer.h[0].mlp
    block.c_fc = Between(block.c_fc, function)
    return model


def step(model, forward, rows=5):
    (x, _), (val, _) = token_batch(rows, 7, seed=1), token_batch(2, 7, seed=2)
    engine = GradDotProdEngine(model, val_data=(val, val))
    engine.attach()
    engine.attach_train_batch(x, x, 0, None)
    engine.track_loss(forward(model, *engine.prepare_forward_input(x, x))).backward()
    engine.prepare_gradients()
    return engine.aggregate_and_log(), (x, val)


def with_labels(model, x, y):
    return model(x, labels=y).loss


def refused():
    return pytest.raises(
        GraddotError, match="in the backward, the gradient of what layer .* depends"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", MIXING)
def test_mixing_in_the_backward_is_refused(kind, dtype):
    model = model_with(MIXING[kind], dtype)
    with refused():
        step(model, with_labels)


@pytest.mark.parametrize("kind", MIXING)
def test_mixing_in_the_backward_of_a_number_is_refused(kind):
    with refused():
        step(graddot_lm.fuse_head(model_with(MIXING[kind])), with_labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("returns", ["logits", "number"])
@pytest.mark.parametrize("kind", BY_SIZE)
def test_what_depends_on_the_size_of_gradients_is_refused(kind, returns, dtype):
    """A sample's is 1 / rows of what it is alone, and in the joint batch another than in training."""
    model = model_with(BY_SIZE[kind], dtype)
    model = graddot_lm.fuse_head(model) if returns == "number" else model
    text = "what layer transformer.* returns is not in proportion to the loss, .* clips gradients"
    if returns == "number":  # whose gradients are larger of fewer rows, and clipped by more
        text += "|normalises gradients over the batch"
    with pytest.raises(GraddotError, match=text):
        step(model, with_labels)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("kind", MIXING)
def test_mixing_behind_a_checkpoint_is_refused(kind, reentrant):
    model = model_with(MIXING[kind])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with refused():
        step(model.train(), with_labels)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_what_is_behind_a_checkpoint_keeps_its_gradients_and_hooks(reentrant):
    model, arrived = model_with(APART["detached-mean"]), []
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: arrived.append(id(p)))
    got, (x, val) = step(model.train(), with_labels)
    assert len(arrived) == len(set(arrived)) == len(list(model.parameters()))
    assert all(p.requires_grad for p in model.parameters())
    plain = model_with(APART["detached-mean"])
    want = total(sample_dots(plain, (x, x), (val, val))[0])
    assert torch.allclose(got, want, rtol=1e-5, atol=0)


def token_loss(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Flat(nn.Module):
    """A language model of tokens without rows, (rows·T, D): or of one sequence of them."""

    def __init__(self, function, in_one):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.up = nn.Embedding(61, 12), nn.Linear(12, 16)
        self.function, self.head = function, nn.Linear(16, 61)
        self.in_one = in_one

    def forward(self, ids, labels=None):
        flat = ids.reshape(1, -1) if self.in_one else ids.flatten()
        x = self.function(self.up(self.embedding(flat)).flatten(0, -2))
        logits = self.head(x[None] if self.in_one else x).view(*ids.shape, 61)
        return logits if labels is None else token_loss(logits, labels)


MIXING_FLAT = {
    "auxiliary-loss": lambda x: AddAuxiliaryLoss.apply(x, (x.mean(0) ** 2).sum()),
    "other-rows": OtherRowsGradient.apply,
    "norm-of-the-batch": normalised_over_batch,
    "stopped-mean": stopped_mean,
}


FORWARDS = {
    "rows": lambda model, x, y: token_loss(model(x), y),
    "number": lambda model, x, y: model(x, y),
}


@pytest.mark.parametrize("in_one", [False, True], ids=["", "one-sequence"])
@pytest.mark.parametrize("returns", FORWARDS)
@pytest.mark.parametrize("kind", MIXING_FLAT)
def test_mixing_in_flat_layers_is_refused(kind, returns, in_one):
    with refused():
        step(Flat(MIXING_FLAT[kind], in_one).double(), FORWARDS[returns])


@pytest.mark.parametrize("in_one", [False, True], ids=["", "one-sequence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("returns", FORWARDS)
def test_flat_layers_that_do_not_mix_are_scored(returns, dtype, in_one):
    model = Flat(lambda x: torch.dropout(x.tanh(), 0.5, False) * 2, in_one)
    got, (x, val) = step(model.to(dtype), FORWARDS[returns])
    want = total(sample_dots(model.double(), (x, x), (val, val), token_loss)[0])
    assert torch.allclose(
        got.double(), want, rtol=1e-4 if dtype == torch.float32 else 0.2, atol=1e-3
    )


LENGTHS = [5, 1, 7, 2, 6]


def packed_step(model):
    x = token_batch(1, sum(LENGTHS), seed=1)[0]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    labels = torch.where(positions == 0, -100, x)
    engine = GradDotProdEngine(model)
    engine.attach()
    engine.set_directions({n: torch.ones_like(p) for n, p in model.named_parameters()})
    batch = {"input_ids": x, "labels": labels, "position_ids": positions}
    engine.attach_train_batch(batch, None, 0, None, segments=LENGTHS)
    inputs, _ = engine.prepare_forward_input(batch)
    model(**inputs, use_cache=False).loss.backward()
    engine.prepare_gradients()
    return engine.aggregate_and_log()


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("kind", MIXING)
def test_mixing_of_the_samples_of_a_packed_row_is_refused(kind, fused):
    by_token = {"other-rows": OtherTokensGradient.apply, "stopped-mean": stopped_mean_of_tokens}
    model = model_with(by_token.get(kind, MIXING[kind]))
    with refused():
        packed_step(graddot_lm.fuse_head(model) if fused else model)


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_packed_samples_that_are_apart_are_scored(dtype, fused):
    model = model_with(torch.tanh, dtype)
    got = packed_step(graddot_lm.fuse_head(model) if fused else model)
    assert got.shape == (5,) and got[1] == 0 and got[0] != 0


class Shifted(nn.Module):
    """Moves all that a norm gets alike: the gradient of what its layer returns is rounding only."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.shift = norm, nn.Linear(24, 1)

    def forward(self, x):
        return self.norm(x + self.shift(x))


def test_a_gradient_that_is_rounding_only(close):
    model = tiny_gpt2()
    model.transformer.ln_f = Shifted(model.transformer.ln_f)
    (x, y), val = token_batch(9, 11, seed=1, ragged=True), token_batch(2, 11, seed=2, ragged=True)
    dots, scales = sample_dots(model, (x, y), val)
    engine = GradDotProdEngine(graddot_lm.fuse_head(model), val_data=val)
    engine.attach()
    engine.attach_train_batch(x, y, 0, None)
    with_labels(model, *engine.prepare_forward_input(x, y)).backward()
    engine.prepare_gradients()
    close(engine.aggregate_and_log(), total(dots), 1e-5, total(scales))


def test_a_model_that_asks_for_gradients_in_every_forward():
    """Also in the runs of a check, which have none."""
    seen = []

    def watched(x):
        x.retain_grad()
        x.register_hook(lambda grad: seen.append(grad.shape)).remove()
        x.register_hook(lambda grad: seen.append(grad.shape))
        return x

    got, (x, val) = step(model_with(watched), with_labels)
    want = total(sample_dots(model_with(torch.clone), (x, x), (val, val))[0])
    assert torch.allclose(got, want, rtol=1e-5, atol=0)
    assert len(seen) > 0


@pytest.mark.parametrize("kind", APART)
def test_what_is_by_row_is_scored(kind):
    model = model_with(APART[kind])
    got, (x, val) = step(model, with_labels)
    want = total(sample_dots(model, (x, x), (val, val))[0])
    assert torch.allclose(got, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [3, 16, 17, 1000])
def test_sketch(width, dtype):
    """Little memory, about the norm, and sums and multiples of what was sketched; a zero stays one."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 5, width).to(dtype)
    x[1] = 0
    kept = backward_check._sketch(x)
    assert kept.dtype == dtype and kept.shape == (3, 5, min(width, 16))
    assert (kept[1] == 0).all()
    assert 0.5 <= float(kept.double().norm() / x.double().norm()) <= 2
    both = backward_check._sketch(2 * x.double() + y.double())
    want = 2 * backward_check._sketch(x.double()) + backward_check._sketch(y.double())
    assert (both - want).norm() <= 1e-12 * want.norm()


def test_little_is_kept(monkeypatch):
    """Of every layer's gradients a sketch, in all of the check's runs."""
    kept, pairs_of = [], backward_check._pairs
    spy = lambda *runs: (kept.extend(runs), pairs_of(*runs))[1]
    monkeypatch.setattr(backward_check, "_pairs", spy)
    model = tiny_gpt2()
    engine = GradDotProdEngine(model, val_data=token_batch(2, 9, seed=2))
    engine.attach()
    x, y = token_batch(4, 9, seed=1)
    engine.attach_train_batch(x, y, 0, None)
    inputs, labels = engine.prepare_forward_input(x, y)
    model(inputs, labels=labels).loss.backward()
    tensors = [x for run in kept for calls in run.values() for x in calls if x is not None]
    assert tensors and max(x.numel() for x in tensors) <= 4 * 9 * 16
