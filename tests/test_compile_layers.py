"""Compiled layers with an engine attached: scored in the graph itself, used several times, and on
batches of one row or of as many rows as tokens."""

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, lm_loss, norm, sample_dots, token_batch, total
from checked_backend import checked
from compiled_steps import (
    MLP,
    Norms,
    WithSeveral,
    check,
    classify,
    compiled,
    fresh_compiler,
    gpt2,
    graphs,
    own_loss,
    points,
    step,
    unscored,
)
from graddot_lm import GraddotError, GradDotProdEngine
from graddot_lm.compiling.in_graph import _LayerBackward
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["fresh_compiler"]  # the fixture


@pytest.mark.parametrize("given", [False, True], ids=["riding", "given"])
def test_layers_that_the_graph_scores_itself(given, close):
    """No op of ours runs a rule; two targets, norms, and samples by micro-batches."""
    model = Norms().double()
    targets, seen = {"a": points(2, 99), "b": points(1, 98)}, []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return checked(graph, inputs)

    call = compiled(model, backend)
    engine = GradDotProdEngine(model, None if given else targets, norms=True)
    engine.attach()
    for i in range(3):
        batches = [points(4 + (i > 1), 2 * i + k) for k in range(2)]
        if given:
            engine.set_directions(
                {name: gradient(model, *val, loss=F.cross_entropy) for name, val in targets.items()}
            )
        for batch in batches:
            step(engine, call, batch, i, classify, factor=0.5)
        plain, rows = unscored(model), []
        for batch in batches:
            rows += [(batch[0][k : k + 1], batch[1][k : k + 1]) for k in range(len(batch[1]))]
        of_samples = [gradient(plain, *row, loss=F.cross_entropy) for row in rows]
        norms = torch.stack([norm(g) for g in of_samples])
        close(engine.gradient_norms(), norms, 1e-10)
        got = engine.aggregate_and_log()
        for row, val in zip(got, targets.values(), strict=True):
            parts = [sample_dots(plain, b, val, loss=F.cross_entropy) for b in batches]
            want, scale = (torch.cat([total(p[k]) for p in parts]) for k in (0, 1))
            close(row, want, 1e-10, scale)
        for name, p in model.named_parameters():
            mean = torch.stack([g[name] for g in of_samples]).mean(0)
            assert (p.grad - mean).norm() <= 1e-10 * mean.norm(), name
        model.zero_grad(set_to_none=True)
    assert seen and not [name for name in seen if "graddot_lm.layer" in name]


@pytest.mark.parametrize(
    ("backend", "asked"), [(checked, 1), ("eager", 5)], ids=["checked", "eager"]
)
def test_a_backward_asks_for_the_scale_once(backend, asked, close, monkeypatch):
    """Each time takes the host long; a backend that makes no graph of the backward has one a layer."""
    model = Norms().double()
    call, own = compiled(model, backend), _LayerBackward.scale
    engine = GradDotProdEngine(model, points(2, 99))
    engine.attach()
    times = []
    monkeypatch.setattr(_LayerBackward, "scale", lambda self: times.append(self) or own(self))
    for i, rows in enumerate((3, 3, 5, 5)):
        # With two val rows no divisor of the 12 entries, of which inputs would be of another mode.
        times.clear()
        train = points(rows, i)
        step(engine, call, train, i, classify)
        assert len(times) == (asked if i else 0)
        check(engine, close, train, points(2, 99), 1e-10, F.cross_entropy)


class Repeating(nn.Module):
    """A block, compiled alone, that runs as often as it is told."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block, self.last, self.times = nn.Linear(12, 12), nn.Linear(12, 7), 1

    def forward(self, x):
        for _ in range(self.times):
            x = torch.tanh(self.block(x))
        return self.last(x)


def test_backward_for_some_tensors_only():
    """Whose graph computes all, and leaves the dots nowhere."""
    model, train = Norms().double(), points(5, 0)
    call = compiled(model)
    engine = GradDotProdEngine(model, points(2, 99))
    engine.attach()
    step(engine, call, train, 0, classify)
    engine.aggregate_and_log()
    engine.attach_train_batch(*train, 1, torch.arange(5))
    x, y = engine.prepare_forward_input(*train)
    engine.track_loss(F.cross_entropy(call(x), y)).backward(inputs=list(model.parameters()))
    with pytest.raises(GraddotError, match="call backward\\(\\) on the loss, without inputs="):
        engine.prepare_gradients()


def test_layer_that_runs_more_often_than_when_it_was_judged(close):
    """The cross terms of its uses would be missing: that step is refused, those after it are right."""
    model, val = Repeating().double(), points(2, 99)
    engine = GradDotProdEngine(model, val)
    engine.attach()
    model.block.compile(backend=checked)
    for i, times in enumerate([1, 1, 2, 2, 1]):
        model.times, train = times, points(5, i)
        if i == 2:
            with pytest.raises(GraddotError, match="layer block ran otherwise in a compiled graph"):
                step(engine, model, train, i, classify)
            engine.clear_gradients()
            continue
        step(engine, model, train, i, classify)
        check(engine, close, train, val, 1e-10, loss=F.cross_entropy)


class Shared(nn.Module):
    """A weight of two embeddings and a head; layers called twice, also on the very same input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.source, self.target = nn.Embedding(30, 10, padding_idx=3), nn.Embedding(30, 10, 3)
        self.mix, self.norm = nn.Linear(10, 10), nn.LayerNorm(10)
        self.head = nn.Linear(10, 30, bias=False)
        self.target.weight = self.source.weight
        self.head.weight = self.source.weight

    def forward(self, ids):
        x = self.source(ids) + 0.5 * self.target((7 * ids + 1) % 30) + self.source(ids)
        x = torch.tanh(self.mix(self.norm(x)) + self.mix(self.norm(x)))
        return self.head(torch.tanh(self.mix(self.norm(x))))


class Reused(nn.Module):
    """Layers in a loop, between which inductor writes into memory that is free again."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(30, 10), nn.Linear(10, 30)
        self.a, self.b = nn.Linear(10, 10), nn.Linear(10, 10)

    def forward(self, ids):
        x = self.embedding(ids)
        for _ in range(2):
            x = torch.tanh(self.a(torch.sin(x) * 1.5))
            x = x * torch.cos(self.b(x)) + x
        return self.head(x)


@pytest.mark.parametrize(
    ("model", "backend"), [(Shared, checked), (Reused, "inductor")], ids=["shared", "reused"]
)
def test_parameters_with_several_uses(model, backend, close):
    """Calls that are the same to a compiler stay two; memory that it reuses is not ours."""
    model = model().double()
    call, val = compiled(model, backend), token_batch(2, 11, 30, seed=7)
    engine = GradDotProdEngine(model, val, label_shift=1)
    engine.attach()
    for i in range(3):
        train = token_batch(5, 11, 30, seed=i)
        step(engine, call, train, i)
        check(engine, close, train, val, 1e-10)
    assert graphs() == 1


class Positions(nn.Module):
    """Position ids that are the same for every row."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(30, 10), nn.Embedding(32, 10)
        self.head = nn.Linear(10, 30)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1])[None])
        return self.head(torch.tanh(x))


def test_tokens_and_a_batch_of_one_row(close):
    """The positions' output has rows that its input has not, and one row is no exception."""
    model, val = Positions().double(), token_batch(2, 11, 30, seed=7)
    call = compiled(model)
    engine = GradDotProdEngine(model, label_shift=1, per_token=True)
    engine.attach()
    engine.set_directions(gradient(model, *val))
    for i, rows in enumerate((3, 3, 1, 4)):
        train = token_batch(rows, 11, 30, seed=i)
        step(engine, call, train, i)
        tokens = engine.token_dots().sum(1)
        torch.testing.assert_close(tokens, sum_of_dots(model, train, val))
        check(engine, close, train, val, 1e-10)


def sum_of_dots(model, train, val):
    return total(sample_dots(unscored(model), train, val)[0])


@pytest.mark.parametrize("model", [MLP, Positions, WithSeveral, gpt2])
def test_batches_of_one_row_come_first(model, close):
    """As with a batch size of one and given directions; more rows may come later."""
    model = model().double()
    tokens = not isinstance(model, MLP)
    loss, run = (lm_loss, own_loss) if tokens else (F.cross_entropy, classify)
    batch = (lambda rows, seed: token_batch(rows, 11, 30, seed=seed)) if tokens else points
    call = compiled(model)
    engine = GradDotProdEngine(model, label_shift=1 if tokens else 0)
    engine.attach()
    engine.set_directions(gradient(model, *batch(2, 99), loss=loss))
    for i, rows in enumerate((1, 1, 4, 4, 1, 3)):
        train = batch(rows, i)
        step(engine, call, train, i, run)
        check(engine, close, train, batch(2, 99), 1e-10, loss=loss)
    assert graphs() <= 3


class Attending(nn.Module):
    """A transformer layer with time first or not."""

    def __init__(self, batch_first):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Embedding(30, 12), nn.Linear(12, 30)
        self.layer = nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, ids):
        x = self.tokens(ids)
        x = self.layer(x) if self.batch_first else self.layer(x.transpose(0, 1))
        return self.head(x if self.batch_first else x.transpose(0, 1))


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_in_evaluation_and_of_as_many_tokens_as_rows(batch_first, close):
    """In eval() PyTorch's attention has another way, whose outputs are others, where nothing needs a
    gradient; and with time first T says nothing of the rows."""
    model, val = Attending(batch_first).double().eval(), token_batch(2, 5, 30, seed=7)
    call = compiled(model)
    engine = GradDotProdEngine(model, val, label_shift=1)
    engine.attach()
    for i, rows in enumerate((3, 4, 3, 2, 4)):
        train = token_batch(rows, 5, 30, seed=i)
        step(engine, call, train, i)
        check(engine, close, train, val, 1e-10)


class OneToken(nn.Module):
    """A convolution and attention, of one token each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv1d(12, 12, 3, padding=1), nn.Linear(12, 7)
        self.layer = nn.TransformerEncoderLayer(12, 2, 16, 0.0)

    def forward(self, x):
        return self.last(self.layer(self.first(x[:, :, None]).permute(2, 0, 1))[0])


def test_layers_of_one_token(close):
    """What their ops return has the strides that the compiler was told, of a dimension of one, too."""
    model, val = OneToken().double(), points(2, 99)
    call = compiled(model)
    engine = GradDotProdEngine(model, val)
    engine.attach()
    for i in range(2):
        train = points(5, i)
        step(engine, call, train, i, classify)
        check(engine, close, train, val, 1e-10, loss=F.cross_entropy)


def test_images_of_as_many_channels_as_the_batch_has_rows(close):
    """Of which the labels, (rows,), say nothing; a model of PyTorch's own class has its hooks in the graph."""

    def images(rows, seed):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, 3, 7, 7, generator=g, dtype=torch.float64)
        return x, torch.randint(0, 5, (rows,), generator=g)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(100, 5)).double()
    call = compiled(model)
    engine = GradDotProdEngine(model, images(1, 99))
    engine.attach()
    for i, rows in enumerate((3, 3, 2, 2, 4)):
        step(engine, call, images(rows, i), i, classify)
        check(engine, close, images(rows, i), images(1, 99), 1e-10, loss=F.cross_entropy)
    assert graphs() == 2


class Dropping(nn.Module):
    """Attention with dropout, which is drawn inside of a scored layer, in a checkpoint."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Embedding(30, 12), nn.Linear(12, 30)
        self.attention = nn.MultiheadAttention(12, 2, dropout=0.5, batch_first=True)

    def forward(self, ids):
        attend = lambda x: x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(torch.tanh(checkpoint(attend, self.tokens(ids), use_reentrant=False)))


def test_dropout_in_a_checkpoint(close):
    """The forward that runs again drops what it dropped at first, and draws nothing of what comes next."""
    model, val = Dropping().double(), token_batch(2, 11, 30, seed=7)
    call = compiled(model)
    engine = GradDotProdEngine(model, val, label_shift=1)
    engine.attach()
    for i in range(2):
        ids, labels = token_batch(3, 11, 30, seed=i)
        engine.attach_train_batch(ids, labels, i, torch.arange(3))
        x, y = engine.prepare_forward_input(ids, labels)
        torch.manual_seed(i)
        loss = own_loss(engine, call, x, y)
        torch.manual_seed(9)
        loss.backward()
        drawn = torch.rand(1)
        engine.prepare_gradients()
        plain = unscored(model)
        torch.manual_seed(i)
        rows = plain(x).split([1, 1, 1, 2])
        *samples, of_val = (
            torch.autograd.grad(lm_loss(*row), list(plain.parameters()), retain_graph=True)
            for row in zip(rows, y.split([1, 1, 1, 2]), strict=True)
        )
        dots = [sum((a * b).sum() for a, b in zip(s, of_val, strict=True)) for s in samples]
        close(engine.aggregate_and_log(), torch.stack(dots), 1e-10)
        for k, p in enumerate(model.parameters()):
            torch.testing.assert_close(p.grad, sum(s[k] for s in samples) / 3)
        model.zero_grad(set_to_none=True)
        torch.manual_seed(9)
        assert drawn == torch.rand(1)
    assert graphs() == 1
