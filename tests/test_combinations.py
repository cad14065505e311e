"""Combinations of what other tests have one at a time: ties, paddings, frozen parts, scalars, odd sizes,
checkpoints. Each is compared with the float64 brute force, one backward a sample; the last test draws
models and loops at random."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from graddot_lm import GraddotError, GradDotProdEngine, linear_cross_entropy
from loop_steps import same_gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

VOCAB, WIDTH = 11, 8


class Net(nn.Module):
    """What a case is made of, in float64, and its forward."""

    def __init__(self, forward, **parts):
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            setattr(self, name, part)
        self.double()

    def forward(self, x, *further):
        return self._forward(self, x, *further)


def own_weight(*shape):
    return nn.Parameter(torch.randn(shape))


def tokens(rows, length=5, *, seed):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, length), generator=g)
    return ids, torch.randint(0, 3, (rows,), generator=g)


def vectors(rows, length=5, *, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, WIDTH, generator=g, dtype=torch.float64)
    return x, torch.randint(0, 3, (rows,), generator=g)


def classes(model, x, y):
    return F.cross_entropy(model(x), y)


def brute_force(model, x, y, loss):
    """Gradients (N, elements) of the trainable parameters, one backward a sample."""
    model, rows = copy.deepcopy(model), []
    for i in range(len(y)):
        model.zero_grad(set_to_none=True)
        loss(model, x[i : i + 1], y[i : i + 1]).backward()
        trainable = [p for p in model.parameters() if p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable]
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def step(engine, train, loss, number=0):
    """One step, with .grad left on the model."""
    model = engine.model
    model.zero_grad(set_to_none=True)
    engine.attach_train_batch(*train, number, None)
    x, y = engine.prepare_forward_input(*train)
    engine.track_loss(loss(model, x, y)).backward()
    engine.prepare_gradients()
    return engine.aggregate_and_log()


def check(engine, train, val, loss, number=0, tolerance=1e-9):
    """A step's scores, norms and .grad; rows have equal weight in the loss."""
    model = engine.model
    own, direction = brute_force(model, *train, loss), brute_force(model, *val, loss).mean(0)
    scores = step(engine, train, loss, number)
    scale = own.norm(dim=1) * direction.norm()
    assert ((scores - own @ direction).abs() <= tolerance * scale).all()
    if engine.norms:
        torch.testing.assert_close(engine.gradient_norms(), own.norm(dim=1), rtol=1e-7, atol=0)
        torch.testing.assert_close(engine.target_norms(), direction.norm(), rtol=1e-7, atol=0)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    parts = own.mean(0).split([p.numel() for p in trainable.values()])
    want = {n: g.view_as(p) for (n, p), g in zip(trainable.items(), parts, strict=True)}
    got = nn.Module()  # whose frozen parameters are left out
    for name, p in trainable.items():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        got.register_parameter(name.replace(".", "/"), p)
    same_gradients(got, {name.replace(".", "/"): g for name, g in want.items()}, tolerance)


@pytest.fixture(params=["riding", "given", "riding-norms", "given-norms"])
def checked(request):
    """Checks several steps of a model in one of four ways."""

    def run(model, data, loss=classes, rows=(3, 4), **options):
        options["norms"] = options.get("norms", "norms" in request.param)
        val = data(2, seed=99)
        given = request.param.startswith("given")
        engine = GradDotProdEngine(model, None if given else val, label_shift=0, **options)
        engine.attach()
        for number, n in enumerate(rows):
            if given:
                engine.set_directions(engine.compute_directions([val], loss))
            check(engine, data(n, seed=number), val, loss, number)
        engine.detach()

    torch.manual_seed(0)
    return run


# Paddings


@pytest.mark.parametrize("paddings", [(None, 0), (0, None), (0, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("head", [False, True], ids=["", "and-head"])
def test_embeddings_of_one_weight_with_other_paddings(checked, paddings, head):
    first, second = (nn.Embedding(VOCAB, WIDTH, padding_idx=p) for p in paddings)
    out = nn.Linear(WIDTH, VOCAB, bias=False)
    second.weight = first.weight
    if head:
        out.weight = first.weight
    forward = lambda m, ids: m.head((m.first(ids) + m.up(m.second(ids.roll(1, 1)))).tanh().mean(1))
    checked(Net(forward, first=first, second=second, up=nn.Linear(WIDTH, WIDTH), head=out), tokens)


def test_a_padding_that_counts_from_the_end(checked):
    """The proof meets no token of it; later batches do."""
    table = Net(lambda m, ids: F.embedding(ids, m.w, -1), w=own_weight(VOCAB, WIDTH))
    forward = lambda m, ids: m.head(m.table(ids).tanh().mean(1))

    def data(rows, *, seed):
        ids, y = tokens(rows, seed=seed)
        return (ids % (VOCAB - 1) if seed in (0, 99) else ids), y

    checked(Net(forward, table=table, head=nn.Linear(WIDTH, 3)), data, rows=(3, 3, 3))


def test_padding_that_comes_later_is_checked():
    """The first batch is as long as the validation rows."""
    model = Net(
        lambda m, x: m.head(m.up(x).tanh().mean(1)), up=nn.Linear(8, 8), head=nn.Linear(8, 3)
    )
    engine = GradDotProdEngine(model, vectors(2, 5, seed=9), padding={"inputs": 0}, label_shift=0)
    engine.attach()
    for number in range(2):
        step(engine, vectors(3, 5, seed=number), classes, number)
    with pytest.raises(GraddotError, match="rows of length 3 that were filled up to 5 change what"):
        step(engine, vectors(3, 3, seed=2), classes, 2)


# Parameters


def test_a_scalar(checked):
    model = Net(lambda m, x: m.head(x.mean(1)) * m.t.exp(), t=own_weight(), head=nn.Linear(8, 3))
    checked(model, vectors)


@pytest.mark.parametrize("frozen", ["in_proj", "in_proj_weight", "out_proj", "out_proj.weight"])
def test_attention_that_is_frozen_in_part(checked, frozen):
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    for name, p in attention.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    forward = lambda m, x: m.head((x + m.attention(m.up(x), x, x)[0]).mean(1))
    checked(Net(forward, up=nn.Linear(8, 8), attention=attention, head=nn.Linear(8, 3)), vectors)


def test_inputs_by_keyword(checked):
    forward = lambda m, ids: m.head(
        input=m.convolution(input=m.norm(input=m.embedding(input=ids))).tanh().mean(1)
    )
    parts = {
        "embedding": nn.Embedding(VOCAB, WIDTH),
        "norm": nn.LayerNorm(WIDTH),
        "convolution": nn.Conv1d(5, 5, 1),
        "head": nn.Linear(WIDTH, 3),
    }
    checked(Net(forward, **parts), tokens)


def test_weights_that_are_computed_once_and_kept(checked):
    """The checks of a step run the model inside of the loop's cached(), too."""
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH))
    model = Net(lambda m, x: m.head(m.up(m.up(x)).tanh().mean(1)), up=layer, head=nn.Linear(8, 3))

    def loss(model, x, y):
        with nn.utils.parametrize.cached():
            return classes(model, x, y)

    checked(model, vectors, loss)


class Keeps(nn.Module):
    """Computes a weight once a step and keeps it, and collects an auxiliary loss of its rows."""

    def __init__(self):
        super().__init__()
        self.weight, self.kept, self.losses = own_weight(WIDTH), {}, []

    def forward(self, x):
        if "exp" not in self.kept:
            self.kept["exp"] = self.weight.exp()
        y = x * self.kept["exp"]
        self.losses.append(y.square().mean())
        return y


def test_what_a_layer_keeps_in_dicts_and_lists(checked):
    """The checks of a step, without gradients or with them, leave nothing there for its forward."""
    model = Net(lambda m, x: m.head(m.layer(x).tanh().mean(1)), layer=Keeps(), head=nn.Linear(8, 3))

    def loss(model, x, y):
        whole = classes(model, x, y) + 0.5 * torch.stack(model.layer.losses).mean()
        model.layer.kept.clear()
        model.layer.losses.clear()
        return whole

    checked(model, vectors, loss)


class FusedHead(nn.Module):
    """A parameter of its own around a fused head, tied or not."""

    def __init__(self, tied):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.scale = own_weight(WIDTH)
        self.double()

    def forward(self, ids):
        hidden = self.embedding(ids) * self.scale
        return linear_cross_entropy(hidden, self.head, ids.roll(-1, 1))[0]


@pytest.mark.parametrize("tied", [False, True])
def test_a_fused_head_in_a_layer_with_parameters_of_its_own(checked, tied):
    data = lambda rows, *, seed: (tokens(rows, seed=seed)[0],) * 2
    checked(FusedHead(tied), data, loss=lambda model, x, y: model(x))


def test_an_excluded_tied_head_in_16_bits():
    model = Net(
        lambda m, ids: m.head(m.up(m.embedding(ids)).mean(1)),
        embedding=nn.Embedding(VOCAB, WIDTH),
        up=nn.Linear(WIDTH, WIDTH),
        head=nn.Linear(WIDTH, VOCAB, bias=False),
    ).float()
    model.head.weight = model.embedding.weight
    engine = GradDotProdEngine(model, label_shift=0, exclude=["embedding.weight"])
    engine.attach()
    covered = dict(model.up.named_parameters(prefix="up"))
    engine.set_directions({name: torch.ones_like(p) for name, p in covered.items()})
    train = tokens(3, seed=1)
    exact = copy.deepcopy(model).double()
    want = brute_force(exact, *train, classes)[:, -WIDTH * (WIDTH + 1) :].sum(1)
    classes(exact, *train).backward()

    def loss(model, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x).float(), y)

    assert ((step(engine, train, loss) - want).abs() <= 5e-2 * want.abs().max()).all()
    grad = exact.embedding.weight.grad
    assert (model.embedding.weight.grad - grad).norm() <= 3e-2 * grad.norm()


# Layers and sizes


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_tied_embedding_inside_of_a_checkpoint(checked, reentrant):
    def forward(m, ids):
        inside = lambda handle: m.up(m.embedding(ids) + handle).tanh()
        return m.head(checkpoint(inside, m.start(ids), use_reentrant=reentrant).mean(1))

    parts = {"start": nn.Embedding(VOCAB, WIDTH), "embedding": nn.Embedding(VOCAB, WIDTH)}
    model = Net(forward, up=nn.Linear(8, 8), head=nn.Linear(WIDTH, VOCAB, bias=False), **parts)
    model.head.weight = model.embedding.weight
    checked(model, tokens)


@pytest.mark.parametrize("lengths", [(1, 3, 2, 1), (3, 1, 2, 4)], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_layers_that_see_tokens_without_their_rows(lengths, rows):
    """With one token a row (rows·T, D) looks like (rows, D)."""
    flat = lambda m, x: m.head(m.up(x.flatten(0, 1)).tanh().view(x.shape).mean(1))
    model = Net(flat, up=nn.Linear(8, 8), head=nn.Linear(8, 3))
    engine = GradDotProdEngine(model, label_shift=0)
    engine.attach()
    for number, length in enumerate(lengths):
        val = vectors(2, length, seed=9)
        engine.set_directions(engine.compute_directions([val], classes))
        check(engine, vectors(rows, length, seed=number), val, classes, number)


@pytest.mark.parametrize("followed", [False, True])
def test_a_model_that_writes_to_its_input(checked, followed):
    """The checks run it several times on one batch. Positions that are not broadcast are followed
    through the whole model, whose first forward then is not that of the step."""

    def forward(m, x):
        x = x.mul_(0.5)
        positions = m.positions(torch.arange(5))
        return m.head((m.up(x) * (positions.flip(0) if followed else 1)).tanh().mean(1))

    def data(rows, *, seed):
        return vectors(rows, seed=seed)

    def loss(model, x, y):  # what is compared with has the input as it came
        return classes(model, x.clone(), y)

    positions = nn.Embedding(5, WIDTH).requires_grad_(followed)
    model = Net(forward, up=nn.Linear(8, 8), positions=positions, head=nn.Linear(8, 3))
    checked(model, data, loss)


# Drawn at random


class Residual(nn.Module):
    """x + inner(x), scaled or not, called once or twice, in a checkpoint or not."""

    def __init__(self, draw, inner):
        super().__init__()
        self.inner, self.times = inner, draw.choice([1, 1, 2])
        self.scale = own_weight(WIDTH) if draw.random() < 0.3 else None
        kinds = [None, None, True] if self.scale is None else [None]
        self.reentrant = draw.choice([*kinds, False] if self.scale is None else kinds)

    def forward(self, x):
        for _ in range(self.times):
            if self.reentrant is None:
                y = self.inner(x)
            else:
                y = checkpoint(self.inner, x, use_reentrant=self.reentrant)
            x = x + (y if self.scale is None else y * self.scale)
        return x


def transposed(layer, dims):
    forward = lambda m, x: m.layer(x.transpose(*dims).contiguous()).transpose(*dims)
    return Net(forward, layer=layer)


BLOCKS = {
    "mlp": lambda: nn.Sequential(nn.Linear(WIDTH, 6), nn.GELU(), nn.Linear(6, WIDTH)),
    "flat": lambda: Net(
        lambda m, x: m.layer(x.reshape(-1, WIDTH)).tanh().view(x.shape), layer=nn.Linear(8, 8)
    ),
    "pooled": lambda: Net(lambda m, x: m.layer(x.mean(1))[:, None].tanh(), layer=nn.Linear(8, 8)),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "rms": lambda: nn.RMSNorm(WIDTH, eps=1e-5),
    "groups": lambda: transposed(nn.GroupNorm(2, WIDTH), (1, 2)),
    "convolution": lambda: transposed(nn.Conv1d(WIDTH, WIDTH, 3, padding=1), (1, 2)),
    "grouped": lambda: transposed(nn.Conv1d(WIDTH, WIDTH, 3, padding="same", groups=4), (1, 2)),
    "transformer": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 6, 0.0, batch_first=True),
    "time-first": lambda: transposed(nn.TransformerEncoderLayer(WIDTH, 2, 6, 0.0), (0, 1)),
    "weight": lambda: Net(
        lambda m, x: F.linear(x, m.w, m.b).sin(), w=own_weight(8, 8), b=own_weight(8)
    ),
    "positions": lambda: Net(
        lambda m, x: m.positions(torch.arange(x.shape[1])).tanh() * x,
        positions=nn.Embedding(9, WIDTH),
    ),
    "class-token": lambda: Net(
        lambda m, x: m.layer(torch.cat([m.c.expand(len(x), 1, WIDTH), x], 1))[:, 1:],
        c=own_weight(WIDTH),
        layer=nn.TransformerEncoderLayer(WIDTH, 2, 6, 0.0, batch_first=True),
    ),
}


def drawn_model(draw):
    blocks = [
        Residual(draw, BLOCKS[draw.choice(list(BLOCKS))]()) for _ in range(draw.choice([1, 2, 3]))
    ]
    embedding = nn.Embedding(VOCAB, WIDTH, padding_idx=draw.choice([None, 0]))
    model = Net(
        lambda m, ids: m.head(m.blocks(m.embedding(ids))).mean(1),
        embedding=embedding,
        blocks=nn.Sequential(*blocks),
        head=nn.Linear(WIDTH, VOCAB, bias=draw.random() < 0.5),
    )
    if draw.random() < 0.5:
        model.head.weight = embedding.weight
    linear = [part for part in model.modules() if type(part) is nn.Linear]
    for _ in range(draw.choice([0, 1, 2])):
        one, other = draw.choice(linear), draw.choice(linear)
        if one.weight.shape == other.weight.shape:
            one.weight = other.weight
    parameters = list(model.parameters())
    for p in parameters[1:]:
        p.requires_grad_(draw.random() < 0.9)
    return model.train(draw.random() < 0.8)


@pytest.mark.parametrize("seed", range(40))
def test_drawn(seed):
    """Steps of other sizes, riding along or not, with norms or not."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model, length = drawn_model(draw), draw.choice([3, 4, 8])
    val, given = tokens(draw.choice([1, 2]), length, seed=99), draw.random() < 0.4
    options = {"norms": draw.random() < 0.5, "label_shift": 0}
    engine = GradDotProdEngine(model, None if given else val, **options)
    engine.attach()
    for number in range(3):
        length = draw.choice([2, 3, 8]) if given else length
        if given:
            engine.set_directions(engine.compute_directions([val], classes))
        train = tokens(draw.choice([1, 2, 3, 6]), length, seed=number)
        check(engine, train, val, classes, number)
