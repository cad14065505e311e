"""What mixes samples in the backward alone is refused; hooks and functions that do not are scored."""

import graddot_lm
import pytest
import torch
from brute_force import sample_dots, tiny_gpt2, token_batch, total
from graddot_lm import GraddotError, GradDotProdEngine
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


def normalised_over_batch(x):
    if x.requires_grad:
        x.register_hook(lambda grad: grad / grad.norm())
    return x


def normalised_by_row(x):
    if x.requires_grad:
        x.register_hook(lambda grad: grad / (1e-3 + grad.flatten(1).norm(dim=1)[:, None, None]))
    return x


def stopped_mean(x):
    mean = x.mean(0, keepdim=True)
    return x + (mean - mean.detach())


MIXING = {
    "auxiliary-loss": lambda x: AddAuxiliaryLoss.apply(x, (x.mean((0, 1)) ** 2).sum()),
    "other-rows": OtherRowsGradient.apply,
    "norm-of-the-batch": normalised_over_batch,
    "stopped-mean": stopped_mean,
}
APART = {
    "norm-of-the-row": normalised_by_row,
    "detached-mean": lambda x: x + x.detach().mean(1, keepdim=True),
    "checkpoint": lambda x: checkpoint(torch.tanh, x, use_reentrant=False),
    "reentrant": lambda x: checkpoint(torch.tanh, x, use_reentrant=True),
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
    forward(model, *engine.prepare_forward_input(x, x)).backward()
    engine.prepare_gradients()
    return engine.aggregate_and_log(), (x, val)


def with_labels(model, x, y):
    return model(x, labels=y).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", MIXING)
def test_mixing_in_the_backward_is_refused(kind, dtype):
    model = model_with(MIXING[kind], dtype)
    with pytest.raises(
        GraddotError, match="in the backward, the gradient of what layer .* depends"
    ):
        step(model, with_labels)


@pytest.mark.parametrize("kind", MIXING)
def test_mixing_in_the_backward_of_a_number_is_refused(kind):
    with pytest.raises(
        GraddotError, match="in the backward, the gradient of what layer .* depends"
    ):
        step(graddot_lm.fuse_head(model_with(MIXING[kind])), with_labels)


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


@pytest.mark.parametrize("kind", APART)
def test_what_is_by_row_is_scored(kind):
    model = model_with(APART[kind])
    got, (x, val) = step(model, with_labels)
    if kind != "norm-of-the-row":  # whose gradient is that of no loss
        want = total(sample_dots(model, (x, x), (val, val))[0])
        assert torch.allclose(got, want, rtol=1e-5, atol=0)
