"""What the tests of compiled models share: ways to compile, steps, comparisons, models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, lm_loss, sample_dots, tiny_gpt2, total
from checked_backend import checked
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    assert not counters["graph_break"], list(counters["graph_break"])


def graphs():
    return counters["stats"]["unique_graphs"]


def compiled(model, backend=checked):
    return torch.compile(model, backend=backend, fullgraph=True)


def in_a_function(model, backend=checked):
    """The model's hooks are then a part of the graph."""
    function = lambda *args, **kwargs: model(*args, **kwargs)
    return torch.compile(function, backend=backend, fullgraph=True)


def gpt2():
    return tiny_gpt2(layers=1)


def unscored(model):
    """A copy without compiled or fused forwards."""
    model = copy.deepcopy(model)
    model.__dict__.pop("forward", None)
    return model


def own_loss(engine, call, x, y, loss=lm_loss):
    out = call(x)
    return engine.track_loss(loss(getattr(out, "logits", out), y))


def its_loss(engine, call, x, y):
    return call(x, labels=y).loss


def step(engine, call, train, i=0, loss=own_loss, factor=1.0):
    """One micro-batch through the compiled model."""
    engine.attach_train_batch(*train, i, torch.arange(len(train[1])))
    (loss(engine, call, *engine.prepare_forward_input(*train)) * factor).backward()
    engine.prepare_gradients()


def check(engine, close, train, val, tolerance, loss=lm_loss):
    """Scores and .grad of a step that ran, against brute force."""
    model = unscored(engine.model)
    want, scales = sample_dots(model, train, val, loss=loss)
    close(engine.aggregate_and_log(), total(want), tolerance, total(scales))
    for name, g in gradient(model, *train, loss=loss).items():
        error = (engine.model.get_parameter(name).grad.double() - g).norm() / g.norm()
        assert error <= tolerance, name
    engine.model.zero_grad(set_to_none=True)


class Norms(nn.Module):
    """Norms of both kinds, one over two dimensions, and linear layers, one without bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.norm, self.mix = nn.LayerNorm((2, 6)), nn.RMSNorm(12), nn.Linear(12, 12)
        self.plain, self.last = nn.LayerNorm(12, bias=False), nn.Linear(12, 7, bias=False)

    def forward(self, x):
        x = self.mix(self.norm(self.wide(x.view(-1, 2, 6)).flatten(1)))
        return self.last(self.plain(torch.tanh(x)))


class Scale(nn.Module):
    """A layer without a rule."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(12) + 0.5)

    def forward(self, x, scaled, y=None):
        return x * self.weight + y if scaled else y


class MLP(nn.Module):
    """Linear layers, a norm, a convolution, a layer of its own, checkpointed in part."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.scale = nn.Linear(12, 12), nn.LayerNorm(12), Scale()
        self.conv, self.last = nn.Conv1d(2, 3, 3, padding=1), nn.Linear(36, 7)

    def forward(self, x):
        x = checkpoint(lambda x: F.gelu(self.norm(self.first(x))), x, use_reentrant=False)
        x = self.scale(x, True, y=x)
        return self.last(torch.tanh(self.conv(torch.stack([x, x * x], 1)).flatten(1)))


def points(rows, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 12, generator=g).double(), torch.randint(0, 7, (rows,), generator=g)


def classify(engine, call, x, y):
    return own_loss(engine, call, x, y, F.cross_entropy)


class Several(nn.Module):
    """A layer without a rule: nested tensors, a number and flags go in, tensors of which one has no
    gradient and one no rows, and None, come out."""

    def __init__(self):
        super().__init__()
        self.weight, self.table = (
            nn.Parameter(torch.rand(12) + 0.5),
            nn.Parameter(torch.rand(6, 12)),
        )

    def forward(self, pair, shift, *, entry=0, kind="square", mask=None):
        x, y = pair
        x = (x * self.weight).roll(shift, -1) + y
        return x, [x.argmax(-1), mask], self.table[None, entry].tanh()


class WithSeveral(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.several, self.head = nn.Embedding(30, 12), Several(), nn.Linear(12, 30)

    def forward(self, ids):
        x = self.tokens(ids)
        x, (largest, nothing), row = self.several((x, x * x), ids.shape[1], entry=1)
        assert nothing is None
        return self.head(torch.tanh(x) * row[:, None] + largest[..., None] / 12)
