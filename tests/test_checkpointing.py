"""Activation checkpointing: refused where it hides something, still saving memory.

test_grid.py shows that it is exact.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from brute_force import lm_loss, sample_dots, tiny_gpt2, token_batch, total
from graddot_lm import GraddotError
from loop_steps import (
    attached,
    run,
)
from model_zoo import VOCAB, deberta
from torch import nn
from torch.utils.checkpoint import checkpoint

KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])


class Borrowed(nn.Module):
    """Reads a layer's weight behind its back, inside a checkpoint."""

    def __init__(self):
        super().__init__()
        self.first, self.linear = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        inside = lambda x: torch.tanh(self.linear(x)) @ self.linear.weight
        return checkpoint(inside, self.first(x), use_reentrant=True)


def test_a_weight_used_behind_the_layers_back_in_a_checkpoint_is_refused():
    y = torch.arange(3) % 4
    engine = attached(Borrowed(), (torch.randn(2, 4), y[:2]), label_shift=0)
    with pytest.raises(GraddotError, match="linear.weight, inside a reentrant checkpoint"):
        run(engine, (torch.randn(3, 4), y), loss=F.cross_entropy)


def test_a_checkpoint_in_a_layer_that_is_followed_is_refused():
    """Its forward runs again where nothing follows it."""
    model = deberta(position_buckets=8).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    engine = attached(model, token_batch(2, 15, VOCAB, seed=2))
    with pytest.raises(
        GraddotError, match="of its parameters runs again for an activation checkpoint, which"
    ):
        run(engine, token_batch(3, 15, VOCAB, seed=1))


class Gained(nn.Module):
    """A parameter of its own around, or inside of, a checkpoint with a layer."""

    def __init__(self, inside, reentrant):
        super().__init__()
        self.first, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))
        self.inside, self.reentrant = inside, reentrant

    def forward(self, x):
        def region(x):
            return torch.tanh(self.layer(x * self.gain if self.inside else x))

        return checkpoint(region, self.first(x), use_reentrant=self.reentrant) * self.gain


@KINDS
@pytest.mark.parametrize("inside", [False, True])
def test_a_checkpoint_in_a_layer_whose_parameters_are_used_around_it(inside, reentrant, close):
    torch.manual_seed(0)
    model = Gained(inside, reentrant).double()
    x, y = torch.randn(5, 4).double(), torch.arange(5) % 4
    train, val = (x[:3], y[:3]), (x[3:], y[3:])
    engine = attached(model, val, label_shift=0)
    if inside:
        with pytest.raises(GraddotError, match="activation checkpoint, which is|has no rule that"):
            run(engine, train, loss=F.cross_entropy)
        return
    for _ in range(2):
        model.zero_grad()
        run(engine, train, loss=F.cross_entropy)
        dots, scales = sample_dots(model, train, val, loss=F.cross_entropy)
        close(engine.aggregate_and_log(), total(dots), 1e-10, total(scales))


def test_the_whole_model_in_a_checkpoint(close):
    model = tiny_gpt2().double()
    train, val = token_batch(3, 15, seed=1), token_batch(2, 15, seed=2)
    dots, scales = sample_dots(model, train, val)
    for reentrant in (False, True):
        engine = attached(model, val)
        engine.attach_train_batch(*train, 0, None)
        x, y = engine.prepare_forward_input(*train)
        handle = torch.zeros((), requires_grad=True)
        logits = checkpoint(
            lambda x, handle: model(x).logits + handle, x, handle, use_reentrant=reentrant
        )
        refused = pytest.raises(GraddotError, match="the whole model runs inside a reentrant")
        with refused if reentrant else contextlib.nullcontext():
            engine.track_loss(lm_loss(logits, y)).backward()
        if not reentrant:
            engine.prepare_gradients()
            close(engine.aggregate_and_log(), total(dots), 1e-10, total(scales))
        engine.detach()


def saved_bytes(model, run):
    """Bytes that the forward leaves for the backward, each memory counted once."""
    seen = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in held:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = run()  # kept alive, so that no memory is counted for two tensors
    del output
    return sum(seen.values())


@KINDS
def test_checkpointing_saves_as_much_memory_as_without_scores(record_property, reentrant):
    model = tiny_gpt2(layers=6)
    train, val = token_batch(6, 31, seed=1), token_batch(2, 31, seed=2)
    joint = torch.cat([train[0], val[0]])
    whole = saved_bytes(model, lambda: model(joint).logits)
    kwargs = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    regular = saved_bytes(model, lambda: model(joint).logits)
    engine = attached(model, val)
    engine.attach_train_batch(*train, 0, None)
    x, _ = engine.prepare_forward_input(*train)
    scored = saved_bytes(model, lambda: model(x).logits)
    record_property("saved_bytes", (whole, regular, scored))
    assert regular < 0.5 * whole and scored <= 1.02 * regular


def test_a_second_backward_is_refused():
    model, val = tiny_gpt2(), token_batch(1, 9, seed=2)
    engine = attached(model, val)
    engine.attach_train_batch(*token_batch(2, 9, seed=1), 0, None)
    x, y = engine.prepare_forward_input(*token_batch(2, 9, seed=1))
    loss = lm_loss(model(x).logits, y)
    loss.backward(retain_graph=True)
    with pytest.raises(GraddotError, match="2 backward passes"):
        loss.backward()
