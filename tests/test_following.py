"""Parameters that a layer uses in its own forward, around large layers inside of it."""

import functools
import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, sample_dots, total
from checked_backend import checked
from engine_steps import close, run_step
from following_cases import CASES, FP32, Block, N, ScaledBy, block, data
from graddot_lm import GraddotError, GradDotProdEngine, check_layer
from graddot_lm.rules.followed import Followed
from graddot_lm.rules.following import Following
from loop_steps import same_gradients
from torch import nn


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Gradients of every sample are allowed for a case's own parameters, not for all in a block."""
    monkeypatch.setattr("graddot_lm.rules.general.LARGEST", 36)


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_followed(name):
    check_layer(block(name), data(4)[0])


def test_a_table_alone():
    check_layer(Block(lambda m, x: m.p[:, : x.shape[1]], p=N(1, 9, 6)), data(4)[0])


class Pooled(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.first, self.block = nn.Linear(6, 6), block(name)
        self.head = nn.Linear(self.block(data(1)[0]).shape[-1], 3)

    def forward(self, x):
        return self.head(self.block(self.first(x)).mean(1))


def check_batches(model, numbers, tolerance=1e-10):
    """Steps of one engine on so many rows, each beside one that rides along."""
    x, y = data(1, seed=1)
    val = x.double(), y
    engine = GradDotProdEngine(model, val, label_shift=0)
    engine.attach()
    for n in numbers:
        x, y = data(n, seed=n)
        x = x.double()
        dots, scales = sample_dots(model, (x, y), val, loss=F.cross_entropy)
        want = gradient(model, x, y, loss=F.cross_entropy)
        engine.attach_train_batch(x, y, n, None)
        joint, labels = engine.prepare_forward_input(x, y)
        engine.track_loss(F.cross_entropy(model(joint), labels)).backward()
        engine.prepare_gradients()
        same_gradients(model, want, tolerance)
        close(engine.aggregate_and_log(), total(dots), tolerance, total(scales))
        model.zero_grad()


@pytest.mark.parametrize("name", CASES)
def test_batches_as_long_as_any_other_dimension(name):
    """What is proven with one number of rows must hold where it is also that of tokens, of
    features or of anything else."""
    check_batches(Pooled(name).double(), (3, 4, 5, 2, 8, 1), 1e-6 if name in FP32 else 1e-10)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_mask_of_dropout_without_rows_is_one_for_all(rows, inplace):
    """Also where what is dropped has as many entries as there are rows, five."""

    def forward(m, x):
        return m.inner(x).detach() * 0 + F.dropout(m.p * 2, 0.5, m.training, inplace)

    model = Block(forward, p=torch.ones(5, 6))
    x, y = data(4)
    engine = GradDotProdEngine(model, data(rows, seed=1), label_shift=0)
    engine.attach()
    masks = []
    for _ in range(4):
        engine.attach_train_batch(x, y, 0, None)
        joint, labels = engine.prepare_forward_input(x, y)
        out = model(joint)
        engine.track_loss(F.cross_entropy(out.mean(1), labels)).backward()
        engine.aggregate_and_log()
        assert set(out.flatten().tolist()) == {0.0, 4.0}
        assert torch.equal(out, out[:1].expand_as(out))
        masks.append(out[0].detach())
    assert not torch.equal(masks[0], masks[1])


def test_what_is_followed_is_let_go_with_the_step():
    """By count of references: a cycle would keep a step's graph for as long as Python does not look."""
    model = Pooled("table-through-a-layer")
    x, y = data(4)
    engine = GradDotProdEngine(model, data(2, seed=1), label_shift=0)
    engine.attach()
    gc.collect()
    gc.disable()
    try:
        for step in range(2):
            engine.attach_train_batch(x, y, step, None)
            joint, labels = engine.prepare_forward_input(x, y)
            engine.track_loss(F.cross_entropy(model(joint), labels)).backward()
            engine.aggregate_and_log()
            assert not any(isinstance(one, (Followed, Following)) for one in gc.get_objects())
    finally:
        gc.enable()


def test_positions_are_not_taken_for_as_many_tokens():
    """In scores by token."""
    model = Block(lambda m, x: m.inner(x) + F.linear(torch.ones(x.shape[1:]).to(x), m.w), w=N(6, 6))
    x, _ = data(4)
    y = torch.arange(20).view(4, 5) % 6
    loss = lambda batch: F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())
    engine = GradDotProdEngine(model, label_shift=0, per_token=True)
    engine.attach()
    engine.set_directions(engine.compute_directions([(x, y)], lambda _, x, y: loss((x, y))))
    engine.attach_train_batch(x, y, 0, None)
    with pytest.raises(GraddotError, match="w is used on 4 tokens of 4 rows; expected 5"):
        engine.track_loss(loss((x, y))).backward()


def _behind_tokens(m, x, virtual):
    """Positions behind virtual tokens: more of them than the layer gets tokens."""
    positions = [torch.arange(x.shape[1] + n)[n:, None].to(x) for n in virtual]
    return m.inner(x) + m.w * (positions[0] + positions[1] + 1)


@pytest.mark.parametrize(
    ("virtual", "rows", "size"), [((3, 8), 5, 1), ((8, 10), 3, 1), ((5, 5), 3, 3 * 5 * 7 * 11 * 13)]
)
def test_lengths_that_a_layer_makes_by_itself(virtual, rows, size):
    """In the proof of the first batch both are multiples of its five rows, by chance; or one of them is, and
    the other of the eleven rows of the next; or of the first number of rows that divides no dimension."""
    model = Pooled("gain").double()
    model.block.register_buffer("table", torch.zeros(size))
    model.block._forward = functools.partial(_behind_tokens, virtual=virtual)
    g = torch.Generator().manual_seed(0)
    make = lambda n, t: (torch.randn(n, t, 6, generator=g).double(), torch.arange(n) % 3)
    val = make(1, 5)
    engine = GradDotProdEngine(model, label_shift=0)
    engine.attach()
    loss = lambda net, x, y: F.cross_entropy(net(x), y)
    engine.set_directions(engine.compute_directions([val], loss))
    for n, t in [(rows, 12), (2, 14), (3, 9), *((n, t) for t in range(4, 12) for n in (2, 3, 4))]:
        x, y = make(n, t)
        dots, scales = sample_dots(model, (x, y), val, loss=F.cross_entropy)
        engine.attach_train_batch(x, y, t, None)
        engine.track_loss(F.cross_entropy(model(x), y)).backward()
        engine.prepare_gradients()
        close(engine.aggregate_and_log(), total(dots), 1e-10, total(scales))
        model.zero_grad()


AUTOCAST = [
    "linear-cast",
    "gain",
    "state-space",
    "einsum",
    "convolution",
    "relative-bias",
    "written-to",
    "sinks",
]


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast(name):
    model, train, val = Pooled(name), data(3), data(1, seed=1)
    dots, scales = sample_dots(model, train, val, loss=F.cross_entropy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, _ = run_step(model, train, val, loss=F.cross_entropy, label_shift=0)
    assert ((scores - total(dots)).abs() / total(scales)).max() <= 2e-2


@pytest.mark.parametrize("name", ["gain", "class-token", "state-space"])
def test_compiled(name):
    model, train, val = Pooled(name), data(3), data(1, seed=1)
    dots, scales = sample_dots(model, train, val, loss=F.cross_entropy)
    engine = GradDotProdEngine(model, val, label_shift=0)
    engine.attach()
    compiled = torch.compile(model, backend=checked, fullgraph=True)
    for step in range(3):
        engine.attach_train_batch(*train, step, None)
        joint, labels = engine.prepare_forward_input(*train)
        engine.track_loss(F.cross_entropy(compiled(joint), labels)).backward()
        engine.prepare_gradients()
        close(engine.aggregate_and_log(), total(dots), 1e-5, total(scales))
        model.zero_grad()


def test_what_is_too_large_is_refused_with_what_to_do():
    layer = Block(lambda m, x: torch.einsum("btd,dk->btk", x, m.w), w=N(6, 7))
    with pytest.raises(GraddotError, match=r"in place: its 42 elements are too .*\n.*its 84 elem"):
        check_layer(layer, data(4)[0])


@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_tables_with_gradients_scaled_by_the_batch_are_refused(bag, scaled):
    """How often an id is in the batch divides its gradient: of one row by itself that can be proven."""
    lookup = {"scale_grad_by_freq": True} | ({"mode": "sum"} if bag else {})

    def forward(m, ids):
        table = m.w * 2 if scaled else m.w
        return F.embedding_bag(ids, table, **lookup) if bag else F.embedding(ids, table, **lookup)

    ids = torch.arange(12).view(4, 3) % 5
    with pytest.raises(GraddotError, match="scale_grad_by_freq and sparse are not supported"):
        check_layer(Block(forward, w=N(5, 6)), ids)
    layer = (nn.EmbeddingBag if bag else nn.Embedding)(5, 6, **lookup)
    with pytest.raises(GraddotError, match="scale_grad_by_freq mixes samples"):
        GradDotProdEngine(layer)
    with pytest.raises(GraddotError, match="make it with sparse=False"):
        GradDotProdEngine(type(layer)(5, 6, sparse=True))


def test_layers_whose_rows_come_second_are_mapped_row_by_row(monkeypatch):
    layer = Block(lambda m, x: (m.inner(x).mT.transpose(0, 1) * m.w).transpose(0, 1), w=N(5))
    with pytest.raises(
        GraddotError, match="in place: .*does not hold.*\n.*row by row: its 47 elements"
    ):
        check_layer(layer, data(4)[0])
    monkeypatch.setattr("graddot_lm.rules.general.LARGEST", 100)
    check_layer(layer, data(4)[0])


def test_a_transformer_layer_in_evaluation_mode_row_by_row(close, monkeypatch):
    """Which under vmap would take PyTorch's fast path, that has no backward."""
    monkeypatch.setattr("graddot_lm.rules.general.LARGEST", 1000)
    scaled = lambda m, x: m.inner((x.transpose(0, 1) * m.w).transpose(0, 1))
    layer = Block(scaled, w=N(6))
    layer.inner = nn.TransformerEncoderLayer(6, 2, 6, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(1), nn.Linear(30, 3)).double().eval()
    x, y = torch.randn(4, 5, 6).double(), torch.arange(4) % 3
    train, val = (x[:3], y[:3]), (x[3:], y[3:])
    dots, scales = sample_dots(model, train, val, loss=F.cross_entropy)
    scores, _ = run_step(model, train, val, loss=F.cross_entropy, label_shift=0)
    close(scores, total(dots), 1e-10, total(scales))


class Scale(nn.Module):
    """Scales what a layer that is another's returns, by that layer's size, as DoRA does."""

    def __init__(self, detached):
        super().__init__()
        self.weight, self.detached = nn.Parameter(torch.rand(6, dtype=torch.float64)), detached

    def forward(self, x, *, layer):
        size = layer(torch.eye(6, dtype=x.dtype)).norm(dim=0)
        return layer(x) * (self.weight / (size.detach() if self.detached else size))


class Scaled(nn.Module):
    def __init__(self, detached):
        super().__init__()
        self.layer, self.scale, self.head = nn.Linear(6, 6), Scale(detached), nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        return self.head(self.scale(x, layer=self.layer).tanh().mean(1))


@pytest.mark.parametrize("rows", [2, 3, 12])
def test_a_layer_that_is_measured_beside(rows):
    """It is called without rows, where nothing gets a gradient."""
    model, (x, y) = Scaled(True), data(rows)
    x = x.double()
    train, val = (x[:-1], y[:-1]), (x[-1:], y[-1:])
    dots, scales = sample_dots(model, train, val, loss=F.cross_entropy)
    want = gradient(model, *train, loss=F.cross_entropy)
    scores, _ = run_step(model, train, val, loss=F.cross_entropy, label_shift=0)
    close(scores, total(dots), 1e-10, total(scales))
    same_gradients(model, want, 1e-10)


@pytest.mark.parametrize(
    ("detached", "rows", "match"),
    [
        (True, 6, r"layer layer .*\(6, 6\).* by layer scale.*another number"),
        (False, 4, r"used outside of the layer that owns them.*layer\.weight"),
    ],
    ids=["as long as the batch", "with a gradient"],
)
def test_a_measure_that_is_refused(detached, rows, match):
    x, y = data(rows)
    train, val = (x[:-1].double(), y[:-1]), (x[-1:].double(), y[-1:])
    with pytest.raises(GraddotError, match=match):
        run_step(Scaled(detached), train, val, loss=F.cross_entropy, label_shift=0)


class Gated(nn.Module):
    """Attention with a bias of two heads, one row's after the other's, that a gate of its own scales."""

    def __init__(self):
        super().__init__()
        self.gate, self.value = nn.Parameter(torch.rand(2, 1, 1) + 0.5), nn.Linear(6, 6)

    def forward(self, x, bias):  # (rows, T, 6), (rows · 2, T, T)
        heads = self.value(x).unflatten(2, (2, 3)).transpose(1, 2).flatten(0, 1)
        scores = bias * self.gate.repeat(len(x), 1, 1) + heads @ heads.mT
        out = scores.softmax(-1) @ heads
        return x + out.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)


class BiasBeside(nn.Module):
    """As WavLM's layers get it, where it is the same in all rows; or one of each."""

    def __init__(self, same):
        super().__init__()
        torch.manual_seed(0)
        self.bias = None if same else nn.Linear(6, 2)
        self.layers, self.head = nn.ModuleList(Gated() for _ in range(2)), nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        positions = torch.arange(50.0).to(x).sin().view(2, 5, 5).repeat(len(x), 1, 1)
        if self.bias is not None:
            positions = positions + self.bias(x).mT.flatten(0, 1)[:, None]
        for layer in self.layers:
            x = layer(x, positions)
        return self.head(x.mean(1))


@pytest.mark.parametrize("same", [False, True], ids=["of each row", "the same"])
def test_heads_of_all_rows_beside_the_input(same):
    check_batches(BiasBeside(same), (3, 4, 1, 9))


def test_two_models_in_threads():
    """One begins its forward in that of the other, and ends it after the other's step."""
    inside, ended = threading.Event(), threading.Event()
    waits: list[str] = []
    x, y = data(5)
    train, val = (x[:3].double(), y[:3]), (x[3:].double(), y[3:])

    def forward(name):
        def run(m, x):
            scaled = m.inner(x) * m.w
            begins, waits[:] = name in waits, [x for x in waits if x != name]
            if begins and name == "first":
                other.start()
                assert inside.wait(60)
            elif begins:
                inside.set()
                assert ended.wait(60)
            return ScaledBy.apply(scaled, m.s) * m.t

        return run

    def make(name):
        torch.manual_seed(len(name))
        block = Block(forward(name), w=N(6), s=N(6), t=N(6))
        model = nn.Sequential(block, nn.Flatten(1), nn.Linear(30, 3)).double()
        engine = GradDotProdEngine(model, val, label_shift=0)
        engine.attach()
        return model, engine

    def step(name, number):
        model, engine = models[name]
        model.zero_grad()
        engine.attach_train_batch(*train, number, None)
        x, y = engine.prepare_forward_input(*train)
        engine.track_loss(F.cross_entropy(model(x), y)).backward()
        engine.prepare_gradients()
        scores[name] = engine.aggregate_and_log()

    models = {name: make(name) for name in ("first", "second")}
    scores: dict[str, torch.Tensor] = {}
    for name in models:
        step(name, 0)
    want = dict(scores)
    scores.clear()
    other = threading.Thread(target=step, args=("second", 1))
    waits += models
    step("first", 1)
    ended.set()
    other.join()
    assert all(torch.equal(scores[name], want[name]) for name in models)


class Kept(nn.Module):
    """Its head is tied by a function that it keeps, in which deepcopy leaves the layer it was made for."""

    def __init__(self, keep):
        super().__init__()
        self.embed, self.up = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))
        self.head = keep(lambda x: x @ self.embed.weight.t())

    def forward(self, x):
        head = self.head if callable(self.head) else self.head[0]
        return head(self.up(self.embed(x)) * self.scale).mean(1)


def kept_step(keep):
    torch.manual_seed(0)
    model, x, y = Kept(keep).double(), torch.randint(7, (5, 4)), torch.randint(7, (5,))
    train, val = (x[:3], y[:3]), (x[3:], y[3:])
    # Functions in a copy use the model's weights, of which the loss of one more backward is.
    want = [
        torch.autograd.grad(F.cross_entropy(model(a), b), list(model.parameters()))
        for a, b in (val, train, *((x[i : i + 1], y[i : i + 1]) for i in range(3)))
    ]
    engine = GradDotProdEngine(model, val, label_shift=0)
    engine.attach()
    engine.attach_train_batch(*train, 0, None)
    x, y = engine.prepare_forward_input(*train)
    engine.track_loss(F.cross_entropy(model(x), y)).backward()
    engine.prepare_gradients()
    dots = [sum((v * g).sum() for v, g in zip(want[0], own, strict=True)) for own in want[2:]]
    return model, want[1], engine.aggregate_and_log(), torch.stack(dots)


def test_a_function_that_a_layer_keeps_uses_the_weights_of_its_copy_in_the_proof():
    model, want, scores, dots = kept_step(lambda function: function)
    for p, grad in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(scores, dots, rtol=0, atol=1e-12)


def test_a_copy_that_uses_the_weights_of_the_model_is_refused():
    with pytest.raises(GraddotError, match=r"a copy of it uses embed.weight of the model itself"):
        kept_step(lambda function: [function])
