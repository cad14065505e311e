"""Models in which a length, a flag, an output or a later batch could be misread: every step is exact,
or refused with the reason. Tokens, features and table entries are eight, as the rows are in one step.
"""

import copy
import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, sample_dots, total
from engine_steps import close
from following_cases import ScaledBy
from graddot_lm import GraddotError, GradDotProdEngine
from loop_steps import same_gradients
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

ROWS = (5, 8, 4, 2, 8)
N = torch.randn
FUTURE = torch.full((1, 8, 8), -torch.inf, dtype=torch.float64).triu(1)


class Net(nn.Module):
    """Layers up and head, what a case adds, and its forward."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.up, self.head, self._forward = nn.Linear(8, 8), nn.Linear(8, 3), forward
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif name.isupper():
                self.register_buffer(name, part)
            else:
                self.register_parameter(name, nn.Parameter(part))

    def forward(self, *inputs):
        return self._forward(self, *inputs)


class Layer(nn.Module):
    def __init__(self, forward, **tensors):
        super().__init__()
        self._forward = forward
        for name, x in tensors.items():
            self.register_parameter(name, nn.Parameter(x))

    def forward(self, *inputs):
        return self._forward(self, *inputs)


class Around(Layer):
    """A layer without parameters of its own, and one inside that it does not call."""

    def __init__(self, forward):
        super().__init__(forward)
        self.inner = nn.Conv1d(8, 8, 3, groups=8, bias=False)


def pooled(m, h):
    return m.head(h.tanh().mean(1))


def _with_masked_class(m, x, mixed=False):
    """Logits, of which those of a class that no label has are -inf; mixed: scaled by all rows' mean."""
    z = pooled(m, m.up(x))
    z = z / z.detach().abs().mean() if mixed else z
    return F.pad(z, (0, 1), value=-torch.inf)


def _slopes(m, x):
    far = -(torch.arange(8)[:, None] - torch.arange(8)).abs().double()
    q = m.up(x).view(len(x), 8, 4, 2).transpose(1, 2)
    weights = (q @ q.mT + m.slope * far[None].repeat(4, 1, 1)).softmax(-1)
    return pooled(m, (weights @ q).transpose(1, 2).flatten(2))


def _rotary(m, x):
    angle, h = torch.arange(8)[:, None] * m.frequency.repeat_interleave(2), m.up(x)
    return pooled(m, h * angle.cos() + h.flip(-1) * angle.sin())


def _biased(m, x):
    q = m.up(x).view(len(x), 8, 4, 2).transpose(1, 2)
    return pooled(m, F.scaled_dot_product_attention(q, q, q, m.b).transpose(1, 2).flatten(2))


def _recurrent(m, x):
    h = torch.zeros(len(x), 8)
    for t in range(x.shape[1]):
        h = torch.tanh(m.up(x[:, t]) + h @ m.w)
    return m.head(h)


def _without_gradient(m, x):
    with torch.no_grad():
        scale = m.w.abs().mean()
    return pooled(m, m.up(x) * m.w / scale)


def _time_first(m, x, time_first):
    x = x.transpose(0, 1) if time_first else x
    return (x * m.w).transpose(0, 1) if time_first else x * m.w


def _centred(m, x):
    positions = m.positions(m.C)
    return pooled(m, m.up(x) + positions - positions.mean(0))


def _less_mean(x):
    return x - x.mean()


def _by_largest(x):
    return x / x.abs().max()


def positions():
    return {"positions": nn.Embedding(8, 8)}


class Standardised(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.std(), bias)


class ListOfTwo(nn.ParameterList):
    def __init__(self):
        super().__init__([N(8), N(8)])


EXACT = {
    "masked-class": lambda: Net(_with_masked_class),
    "masked-class-of-a-followed-layer": lambda: Net(
        lambda m, x: m.last(pooled(m, m.up(x))),
        last=Layer(lambda m, z: F.pad(z * m.w, (0, 1), value=-torch.inf), w=N(3)),
    ),
    "masked-scores-of-a-followed-layer": lambda: Net(
        lambda m, x: pooled(m, m.scores(m.up(x), FUTURE).softmax(-1) @ x),
        scores=Layer(lambda m, h, mask: (h * m.w) @ h.mT + mask, w=N(8)),
    ),
    "table-of-two": lambda: Net(
        lambda m, x: pooled(m, m.up(x) * torch.cat([m.a, m.b])), a=N(3, 8), b=N(5, 8)
    ),
    "weight-of-two": lambda: Net(
        lambda m, x: pooled(m, F.linear(m.up(x), torch.cat([m.a, m.b]))), a=N(4, 8), b=N(4, 8)
    ),
    "mean-of-copies": lambda: Net(
        lambda m, x: pooled(m, m.up(x) + m.p.expand(len(x), -1, -1).mean(0)), p=N(1, 8, 8)
    ),
    "slopes-of-heads": lambda: Net(_slopes, slope=N(())),
    "rotary": lambda: Net(_rotary, frequency=N(4)),
    "class-token": lambda: Net(
        lambda m, x: pooled(m, torch.cat([m.c.expand(len(x), 1, 8), m.up(x)], 1)), c=N(8)
    ),
    "bias-of-attention": lambda: Net(_biased, b=N(8, 8)),
    "biases-of-heads": lambda: Net(_biased, b=N(4, 8, 8)),
    "recurrent": lambda: Net(_recurrent, w=N(8, 8) / 3),
    "without-gradient": lambda: Net(_without_gradient, w=N(8)),
    "another-flag": lambda: Net(
        lambda m, x: pooled(m, m.scale(m.scale(m.up(x), False), True)),
        scale=Layer(_time_first, w=N(8)),
    ),
    "convolution-of-its-own": lambda: Net(
        lambda m, x: pooled(m, m.convolution(m.up(x).mT).mT),
        convolution=Standardised(8, 8, 3, padding=1),
    ),
    "list-of-parameters": lambda: Net(
        lambda m, x: pooled(m, m.up(x) * m.both[0] + m.both[1]), both=ListOfTwo()
    ),
    # Layers whose input has no rows, in models that do more with what they return than to add it.
    "positions": lambda: Net(
        lambda m, x: pooled(m, m.up(x) * m.positions(torch.arange(8))), **positions()
    ),
    "positions-from-the-end": lambda: Net(
        lambda m, x: pooled(m, m.up(x) * m.positions(torch.arange(8)).flip(0)), **positions()
    ),
    "positions-unsqueezed": lambda: Net(
        lambda m, x: pooled(m, m.up(x) * m.positions(torch.arange(8)).unsqueeze(0)), **positions()
    ),
    "positions-centred": lambda: Net(_centred, positions=nn.Linear(2, 8), C=N(8, 2)),
    "prototypes": lambda: Net(
        lambda m, x: m.up(x).tanh().mean(1) @ m.classes(m.C).t(),
        classes=nn.Linear(5, 8), C=N(3, 5), head=nn.Identity(),
    ),
    # As many of them as there are rows, in one step.
    "prototypes-scaled": lambda: Net(
        lambda m, x: m.up(x).tanh().mean(1) @ m.classes(m.C).t(),
        classes=Layer(lambda m, x: x * m.w, w=N(8)), C=N(5, 8), head=nn.Identity(),
    ),
    "prototypes-convolved": lambda: Net(
        lambda m, x: m.up(x).tanh().mean(1) @ m.classes(m.C).flatten(1).t(),
        classes=nn.Conv1d(2, 2, 1), C=N(5, 2, 4), head=nn.Identity(),
    ),
    # Each row gets a copy of them, and what is made of all copies is the same as of one.
    "positions-less-their-mean": lambda: Net(
        lambda m, x: pooled(m, m.up(x) + _less_mean(m.positions(torch.arange(8)))), **positions()
    ),
    "positions-by-the-largest": lambda: Net(
        lambda m, x: pooled(m, m.up(x) + _by_largest(m.positions(torch.arange(8)[None]))),
        **positions(),
    ),
    "mean-of-one-table": lambda: Net(
        lambda m, x: pooled(m, m.up(x) + m.table().mean(0)),
        table=Layer(lambda m: 2 * m.p, p=N(1, 8, 8)),
    ),
    "first-of-positions": lambda: Net(
        lambda m, x: pooled(m, m.up(x) + m.positions(torch.arange(8)[None])[0]), **positions()
    ),
    "loss-of-centred-positions": lambda: Net(
        lambda m, x, y: F.cross_entropy(
            pooled(m, m.up(x) + _less_mean(m.positions(torch.arange(8)))), y
        ),
        **positions(),
    ),
    "output-in-a-dataclass": lambda: Net(
        lambda m, x: Output(pooled(m, m.up(x) * m.w)), w=N(8)
    ),
    "output-in-a-namespace": lambda: Net(
        lambda m, x: SimpleNamespace(logits=pooled(m, m.up(x) * m.w)), w=N(8)
    ),
    "loss-alone": lambda: Net(
        lambda m, x, y: F.cross_entropy(pooled(m, m.up(x) * m.w), y), w=N(8)
    ),
    "weight-norms": lambda: Net(
        lambda m, x: pooled(m, m.conv(m.normed(m.up(x)))),
        normed=weight_norm(nn.Linear(8, 8, bias=False)),
        conv=weight_norm(nn.Conv1d(8, 8, 3, padding=1, groups=4), dim=2),
    ),
    "weight-behind-a-dataclass": lambda: Net(
        lambda m, x: Output(pooled(m, F.linear(m.up(x), m.up.weight)))
    ),
    "weight-used-by-a-layer-around": lambda: Net(
        lambda m, x: pooled(m, m.around(m.up(x))),
        around=Around(lambda m, x: F.conv1d(x, m.inner.weight.squeeze(1)[:, None], padding=1, groups=8)),
    ),
    "forward-called-directly": lambda: Net(
        lambda m, x: pooled(m, m.scale.forward(m.up(x))), scale=Layer(lambda m, x: x * m.w, w=N(8))
    ),
    "buffer-as-an-argument": lambda: Net(
        lambda m, x: pooled(m, m.gate(m.up(x), m.BIAS)),
        gate=Layer(lambda m, x, bias: x * (m.w + bias), w=N(8)), BIAS=N(8),
    ),
}  # fmt: skip


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


def loss_of(out, y):
    out = getattr(out, "logits", out)
    return out if out.dim() == 0 else F.cross_entropy(out, y)


def data(rows, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 8, 8, generator=g, dtype=torch.float64)
    return x, torch.randint(3, (rows,), generator=g)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Gradients of every sample are not held for all of a model."""
    monkeypatch.setattr("graddot_lm.rules.general.LARGEST", 80)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def step(engine, model, x, y, number, loss=loss_of, takes_labels=False):
    engine.attach_train_batch(x, y, number, None)
    joint, labels = engine.prepare_forward_input(x, y)
    out = model(joint, labels) if takes_labels else model(joint)
    engine.track_loss(loss(out, labels)).backward()
    engine.prepare_gradients()
    return engine.aggregate_and_log()


@pytest.mark.parametrize("name", EXACT)
def test_what_could_be_misread_is_exact(name):
    model, val = EXACT[name](), data(1, seed=1)
    takes_labels = name in ("loss-alone", "loss-of-centred-positions")
    engine = GradDotProdEngine(model, val, label_shift=0)
    for number, rows in enumerate(ROWS):
        x, y = data(rows - 1, seed=number)
        if takes_labels:
            plain = copy.deepcopy(model)
            alone = [
                torch.autograd.grad(plain(x[i : i + 1], y[i : i + 1]), list(plain.parameters()))
                for i in range(len(x))
            ]
            of_val = torch.autograd.grad(plain(*val), list(plain.parameters()))
            pairs = [[(a * b).sum() for a, b in zip(g, of_val, strict=True)] for g in alone]
            want = torch.tensor([float(sum(pair)) for pair in pairs])
            scales = None
        else:
            dots, of_parameters = sample_dots(model, (x, y), val, loss=loss_of)
            want, scales = total(dots), total(of_parameters)
            want_grad = gradient(model, x, y, loss=loss_of)
        model.zero_grad(set_to_none=True)
        engine.attach()
        scores = step(engine, model, x, y, number, takes_labels=takes_labels)
        engine.detach()
        close(scores, want, 1e-9, scales)
        if not takes_labels:
            same_gradients(model, want_grad, 1e-9)


def _clamped(m, x):
    scale = m.w * 2
    scale[:].clamp_(max=3.0)
    return x * scale


def _of_ones(m, x):
    """Of which it does not show whether they lie row by row."""
    return m.ones(torch.ones(8 * len(x), 8)).cos()


def _only_in_fp32(x):
    """Its backward fails in another dtype, as that of a proof is."""

    def see(grad):
        if grad.dtype != torch.float32:
            raise TypeError("no gradient of float64")

    if x.requires_grad:
        x.register_hook(see)
    return x


class _ByTokens(ScaledBy):
    """x * weight, with the weight's gradient over the number of rows."""

    @staticmethod
    def backward(ctx, grad):
        x_grad, weight_grad = ScaledBy.backward(ctx, grad)
        return x_grad, weight_grad / len(grad)


def _sorted(m, x):
    order = x[:, 0, 0].round().argsort(stable=True)
    back = order.argsort(stable=True)
    return pooled(m, m.up(x[order]))[back]


def _neighbours(x):
    """Of the first row the second, of the third the fourth, and the other way round."""
    return x[(torch.arange(len(x)) ^ 1).clamp(max=len(x) - 1)]


def _similar(m, x):
    h = F.normalize(m.up(x).mean(1), dim=-1)
    return h @ F.normalize(m.other(x).mean(1), dim=-1).t()


def with_table(run):
    return Net(run, table=Layer(lambda m, x: m.p[:, : x.shape[1]], p=N(1, 8, 8)))


REFUSED = {
    "masked-class": (
        lambda: Net(functools.partial(_with_masked_class, mixed=True)),
        loss_of,
        "the model has an output .* that depends on other samples",
    ),
    "written-in-place": (
        lambda: Net(lambda m, x: pooled(m, _clamped(m, m.up(x))), w=N(8)),
        loss_of,
        "clamp_ writes into a tensor that was computed from its parameters",
    ),
    "first-of-a-table": (
        lambda: with_table(lambda m, x: pooled(m, m.up(x) + m.table(x)[0])),
        loss_of,
        "what layer table returns .* samples look at other samples' copies, .* in the first of them",
    ),
    "mean-of-a-table-behind-each-sample's-own": (
        lambda: with_table(lambda m, x: ([*m.up(x)], pooled(m, m.up(x) + m.table(x).mean(0)))),
        lambda out, y: F.cross_entropy(out[1], y),
        "what layer table returns .* samples look at other samples' copies, as in a mean over all",
    ),
    "ones-with-time-first": (
        lambda: Net(
            lambda m, x: pooled(m, m.up(x) + _of_ones(m, x).view(8, len(x), 8).transpose(0, 1)),
            ones=nn.Linear(8, 8),
        ),
        loss_of,
        "what layer ones returns for a sample reaches what the model returns for others",
    ),
    "parameter-in-the-loss": (
        lambda: Net(lambda m, x: (pooled(m, m.up(x)), m.temperature.weight), temperature=nn.Linear(1, 1)),
        lambda out, y: F.cross_entropy(out[0] * out[1].exp(), y),
        "parameters used outside of the layer that owns them",
    ),
    "penalty-in-the-loss": (
        lambda: Net(lambda m, x: (pooled(m, m.up(x)), m.head.weight)),
        lambda out, y: F.cross_entropy(out[0], y) + out[1].square().sum(),
        r"used outside of the layer that owns them.*head\.weight",
    ),
    "large-weight-behind-a-dataclass": (
        lambda: Net(
            lambda m, x: Output(
                pooled(m, m.up(x)) + (x[:, 0, :1] * m.up.weight.repeat(2, 1).flatten()).mean(1, True)
            )
        ),
        loss_of,
        r"used outside of the layer that owns them.*up\.weight",
    ),
    "output-without-tensors": (
        lambda: Net(lambda m, x: Hidden(pooled(m, m.up(x)))),
        lambda out, y: F.cross_entropy(out.get(), y),
        "a Hidden, in which no tensor was found",
    ),
    "a-later-row": (
        lambda: Net(lambda m, x: pooled(m, m.up(x) * x[-1].norm())),
        loss_of,
        "depends on other samples of the batch of 5 rows",
    ),
    "neighbouring-rows": (
        lambda: Net(lambda m, x: pooled(m, m.up(x) + _neighbours(m.up(x)))),
        loss_of,
        "depends on other samples of the batch of 5 rows",
    ),
    "loss-of-neighbouring-rows": (
        lambda: Net(lambda m, x: F.mse_loss(m.up(x), _neighbours(m.up(x)))),
        loss_of,
        "Expected the mean over the labelled tokens of all rows",
    ),
    "every-pair-of-rows": (
        lambda: Net(_similar, other=nn.Linear(8, 8)),
        lambda out, y: F.cross_entropy(out, torch.arange(len(out))),
        "an entry for every pair of its 5 rows",
    ),
    "loss-of-pairs": (
        lambda: Net(
            lambda m, x: F.cross_entropy(_similar(m, x), torch.arange(len(x))),
            other=nn.Linear(8, 8),
        ),
        lambda out, y: out,
        "the model's loss is .* Expected the mean over the labelled tokens of all rows",
    ),
    "loss-of-pairs-and-a-parameter": (
        lambda: Net(
            lambda m, x: F.cross_entropy(_similar(m, x) * m.t, torch.arange(len(x))),
            other=nn.Linear(8, 8), t=N(()),
        ),
        lambda out, y: out,
        "neither the mean nor the sum",
    ),
    "checkpoint-of-what-is-followed": (
        lambda: Net(
            lambda m, x: pooled(
                m, checkpoint(lambda h: h * m.w, m.up(x), use_reentrant=False)
            ),
            w=N(8),
        ),
        loss_of,
        "runs again for an activation checkpoint",
    ),
    "gradient-over-the-rows": (
        lambda: Net(lambda m, x: pooled(m, _ByTokens.apply(m.up(x), m.w)), w=N(8)),
        loss_of,
        "sum over samples of the gradient of w differs",
    ),
    "backward-that-fails": (
        lambda: Net(lambda m, x: pooled(m, _only_in_fp32(m.up(x) * m.w)), w=N(8)),
        loss_of,
        "its backward: TypeError: no gradient of float64",
    ),
}  # fmt: skip


class Hidden:
    def __init__(self, x):
        self.get = lambda: x


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_misread_is_refused(name):
    make, loss, reason = REFUSED[name]
    model, val = make(), data(1, seed=1)
    engine = GradDotProdEngine(model, val, label_shift=0)
    engine.attach()
    with pytest.raises(GraddotError, match=reason):
        step(engine, model, *data(4), 0, loss)


def test_rows_that_change_places_later_are_found():
    """The first ten batches are in order already; the next is checked like the first."""
    model, val = Net(_sorted), data(1, seed=1)
    val[0][:, 0, 0] = 2
    engine = GradDotProdEngine(model, val, label_shift=0)
    engine.attach()
    for number in range(10):
        x, y = data(4, seed=number)
        x[:, 0, 0] = 1
        step(engine, model, x, y, number)
    x[:, 0, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    with pytest.raises(GraddotError, match="depends on other samples"):
        step(engine, model, x, y, 10)


def test_a_first_step_that_was_given_up_is_checked_again():
    model, val = Net(lambda m, x: (pooled(m, m.up(x)), m.head.weight)), data(1, seed=1)
    engine = GradDotProdEngine(model, val, label_shift=0)
    engine.attach()
    wrong = lambda out, y: F.cross_entropy(out[0], y) + out[1].square().sum()
    for _ in range(2):
        with pytest.raises(GraddotError, match="used outside"):
            step(engine, model, *data(4), 0, wrong)
        engine.clear_gradients()


@pytest.mark.parametrize("own", [True, False], ids=["own-loss", "model's"])
def test_nothing_is_told_by_a_loss_that_is_no_number(own):
    """Such a first step is refused, and the next is checked in its place. A later one, where checks are due
    again, goes on as it would without scores."""
    forward = lambda m, x: m.head(m.up(x + x.roll(1, 0) if m.MIXED else x).mean(1))
    model = nn.ModuleDict({"net": Net(forward, MIXED=torch.zeros(()))})
    model.forward = lambda x, y: F.cross_entropy(model["net"](x), y)
    net = model["net"] if own else model
    engine = GradDotProdEngine(net, data(1, seed=1), label_shift=0)
    engine.attach()

    def scores(x, number):
        y = data(len(x))[1]
        engine.clear_gradients()
        engine.attach_train_batch(x, y, number, torch.arange(len(x)))
        inputs, labels = engine.prepare_forward_input(x, y)
        if own:
            loss = engine.track_loss(F.cross_entropy(net(inputs), labels))
        else:
            loss = net(inputs, labels)
        loss.backward()
        engine.prepare_gradients()
        return engine.aggregate_and_log()

    broken = data(4)[0]
    broken[1, 2] = torch.nan
    with pytest.raises(GraddotError, match="loss of the first step is nan"):
        scores(broken, 0)
    model["net"].MIXED.fill_(1)
    for x in (broken, data(4)[0]):
        with pytest.raises(GraddotError, match="depends on other samples"):
            scores(x, 0)
    model["net"].MIXED.zero_()
    for number in range(10):
        assert scores(data(4)[0], number).isfinite().all()
    assert scores(broken, 10).isnan().any()


def _slope(net, x, keep):
    """The slope of `up` at the inputs, (rows, T, 8), by a backward inside of the forward."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = net.up(x)
        return torch.autograd.grad(y.square().sum(), x, create_graph=keep, retain_graph=True)[0]


@pytest.mark.parametrize("keep", [True, False], ids=["create_graph", "constant"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_backward_inside_of_the_forward_is_refused(keep, first):
    """Whose gradients would be taken for the step's: in later steps as in the first."""
    slopes = [first]
    forward = lambda m, x: pooled(m, x + _slope(m, x, keep) if slopes[0] else m.up(x))
    model = Net(forward)
    engine = GradDotProdEngine(model, data(1, seed=1), label_shift=0)
    engine.attach()
    if not first:
        step(engine, model, *data(4), 0)
        slopes[0] = True
    with pytest.raises(GraddotError, match="a backward ran inside of the model's forward"):
        step(engine, model, *data(4), 1)


@pytest.mark.parametrize("penalty", [True, False], ids=["penalty", "step"])
def test_a_backward_whose_graph_is_kept_for_second_derivatives_is_refused(penalty):
    """Said before its gradients are taken for those of a weight used elsewhere or of a second backward."""
    model, (x, y) = Net(lambda m, x: pooled(m, m.up(x))), data(4)
    engine = GradDotProdEngine(model, data(1, seed=1), label_shift=0)
    engine.attach()
    engine.attach_train_batch(x, y, 0, None)
    x, y = engine.prepare_forward_input(x, y)
    loss = F.cross_entropy(model(x.requires_grad_()), y)
    with pytest.raises(GraddotError, match="a backward with create_graph=True"):
        if penalty:
            torch.autograd.grad(loss, x, create_graph=True)
        else:
            engine.track_loss(loss).backward(create_graph=True)
