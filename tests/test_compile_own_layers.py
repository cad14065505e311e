"""Compiled layers without a rule, with an engine attached: one op in the graph whatever they take and
return, or a break of the graph that names us."""

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, sample_dots, token_batch, total
from checked_backend import checked
from compiled_steps import (
    WithSeveral,
    check,
    classify,
    compiled,
    fresh_compiler,
    graphs,
    in_a_function,
    points,
    step,
)
from graddot_lm import GraddotError, GradDotProdEngine
from graddot_lm.compiling.tracing import LayerSite
from torch import nn
from torch._dynamo.utils import counters

__all__ = ["fresh_compiler"]  # the fixture


@pytest.mark.parametrize("way", [compiled, in_a_function])
def test_layer_of_several_inputs_and_outputs(way, close):
    """The number, which is that of the tokens, becomes a variable like it."""
    model, val = WithSeveral().double(), token_batch(2, 11, 30, seed=99)
    call = way(model)
    engine = GradDotProdEngine(model, label_shift=1)
    engine.attach()
    engine.set_directions(gradient(model, *val))
    for i, (rows, tokens) in enumerate([(5, 11), (5, 11), (5, 9), (5, 10), (6, 8), (1, 8), (1, 9)]):
        train = token_batch(rows, tokens, 30, seed=i)
        step(engine, call, train, i)
        check(engine, close, train, val, 1e-10)
    assert graphs() <= 4  # fixed, any number of tokens, any number of rows, one row


def test_a_layer_that_returns_another_dtype_than_when_it_was_compiled_is_refused(monkeypatch):
    """Code that is made of the graph would read its memory by the other one."""
    shapes = LayerSite.shapes
    monkeypatch.setattr(LayerSite, "shapes", lambda *args: [x.float() for x in shapes(*args)])
    model, val = WithSeveral().double(), token_batch(2, 11, 30, seed=99)
    call = torch.compile(model, backend="aot_eager")
    engine = GradDotProdEngine(model, val, label_shift=1)
    engine.attach()
    train = token_batch(5, 11, 30, seed=0)
    step(engine, call, train)
    engine.aggregate_and_log()
    with pytest.raises(GraddotError, match=r"returned .*float64.*compiled .*float32"):
        step(engine, call, train, 1)


class WithGroups(nn.Module):
    """A norm that is followed, in fp32 under autocast; its own forward returns its input's 16 bits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(12, 12), nn.GroupNorm(2, 12), nn.Linear(12, 7)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layer_that_is_wider_under_autocast_than_its_own_forward(dtype):
    model, val = WithGroups(), points(2, 99)
    call = compiled(model)
    engine = GradDotProdEngine(model, (val[0].float(), val[1]))
    engine.attach()
    for i in range(2):
        train = points(5, i)
        want, scales = sample_dots(model, train, val, loss=F.cross_entropy)
        grads = gradient(model, *train, loss=F.cross_entropy)
        with torch.autocast("cpu", dtype):
            step(engine, call, (train[0].float(), train[1]), i, classify)
        error = (engine.aggregate_and_log() - total(want)).abs() / total(scales)
        assert error.max() <= 2e-2
        for name, p in model.named_parameters():
            assert (p.grad - grads[name]).norm() <= 3e-2 * grads[name].norm(), name
        model.zero_grad()
    assert graphs() == 1


class Packed(nn.Module):
    """A layer that returns a mapping, which no graph is made to hold."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(12) + 0.5)

    def forward(self, x):
        return {"scaled": x * self.weight}


class WithPacked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.packed, self.last = Packed(), nn.Linear(12, 7)

    def forward(self, x):
        return self.last(self.packed(x)["scaled"])


class Choosing(nn.Module):
    """Layers without a rule whose forwards look at what they are given: whether two arguments are
    one tensor, whether one is their own parameter, a flag, a number's size; or at whether they are compiled,
    as Mamba's, which are not where their op runs."""

    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(12) + 0.5)

        def forward(self, x, y):
            return x * self.weight if x is y else y + x * self.weight**2

    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(12) + 0.5)

        def forward(self, x, weight):
            return x * weight if weight is self.weight else x + weight

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(12) + 0.5)

        def forward(self, x, both, long):
            assert not torch.compiler.is_compiling()
            x = x * self.weight if long else x + self.weight
            return (x, 2 * x) if both else x

    def __init__(self, given):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Embedding(30, 12), nn.Linear(12, 30)
        self.same, self.both = self.Same(), self.Both()
        self.given = self.Given() if given else None

    def forward(self, ids):
        x = self.tokens(ids)
        x = self.same(x, x) + self.same(x, torch.sin(x))
        x, twice = self.both(torch.tanh(x), True, ids.shape[1] > 5)
        x = self.both(x + twice, False, False)
        if self.given is not None:
            x = self.given(x, self.given.weight)
        return self.head(torch.tanh(x))


@pytest.mark.parametrize("way", [compiled, in_a_function])
def test_layer_that_looks_at_its_arguments(way, close):
    model, val = Choosing(given=False).double(), token_batch(2, 11, 30, seed=99)
    call = way(model)
    engine = GradDotProdEngine(model, label_shift=1)
    engine.attach()
    engine.set_directions(gradient(model, *val))
    for i, tokens in enumerate([11, 11, 9, 10, 12]):
        train = token_batch(5, tokens, 30, seed=i)
        step(engine, call, train, i)
        check(engine, close, train, val, 1e-10)


def test_layer_given_its_own_parameter(close):
    """It would be a tensor like others in a graph; the layer runs uncompiled."""
    model, val = Choosing(given=True).double(), token_batch(2, 11, 30, seed=99)
    call = torch.compile(model, backend=checked)
    engine = GradDotProdEngine(model, val, label_shift=1)
    engine.attach()
    for i in range(3):
        train = token_batch(5, 11, 30, seed=i)
        step(engine, call, train, i)
        check(engine, close, train, val, 1e-10)
    assert any("graddot: a scored layer" in reason for reason in counters["graph_break"])
    counters.clear()


class Remembering(nn.Module):
    """A layer that leaves a tensor in an attribute."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(12) + 0.5)

    def forward(self, x):
        self.squares = (x * x).detach()
        return x * self.weight


class WithRemembering(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.remembering, self.last = nn.Linear(12, 12), Remembering(), nn.Linear(12, 7)

    def forward(self, x):
        x = self.remembering(torch.tanh(self.first(x)))
        return self.last(x + self.remembering.squares)


@pytest.mark.parametrize("model", [WithPacked, WithRemembering])
def test_layer_that_breaks_the_graph(model, close):
    """One that returns a mapping, or leaves in an attribute what the model reads after, which a graph in
    which the layer is one op would not see, runs uncompiled: no wrong scores, and the break names us."""
    model, val = model().double(), points(2, 99)
    engine = GradDotProdEngine(model, val)
    engine.attach()
    call = torch.compile(model, backend=checked)
    for i in range(3):
        train = points(5, i)
        step(engine, call, train, i, classify)
        check(engine, close, train, val, 1e-10, loss=F.cross_entropy)
    assert any("graddot: a scored layer" in reason for reason in counters["graph_break"])
    counters.clear()
