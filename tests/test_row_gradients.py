"""A weight that a function of one's own takes whole, as TRL's DPO does the language-model head's."""

import gc
from types import MethodType

import pytest
import torch
from brute_force import gradient, sample_dots, total
from engine_steps import TOLERANCE, close
from graddot_lm import GraddotError, GradDotProdEngine
from graddot_lm.shared_uses import products, vector_form
from test_norms_option import sample_norms
from torch import nn

VOCAB, WIDTH = 23, 6


class LogProbs(torch.autograd.Function):
    """log_softmax(hidden weightᵀ + bias) at the targets, and its mean over the vocabulary for the logs."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        logits = hidden @ weight.t() + (0 if bias is None else bias)
        logs = logits.log_softmax(-1)
        ctx.save_for_backward(hidden, weight, logs, targets)
        mean = logs.mean(-1)
        ctx.mark_non_differentiable(mean)
        return logs.gather(1, targets[:, None]).squeeze(1), None, mean

    @staticmethod
    def backward(ctx, grad, *_):
        hidden, weight, logs, targets = ctx.saved_tensors
        logits = (nn.functional.one_hot(targets, len(weight)) - logs.exp()) * grad[:, None]
        bias = logits.sum(0) if ctx.needs_input_grad[2] else None
        return logits @ weight, logits.t() @ hidden, bias, None


class Model(nn.Module):
    """Log-probabilities of the ids that come next: of all, or of those alone that have a label."""

    def __init__(self, picks=False, tied=False, bias=False, times=1):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=bias)
        if tied:
            self.head.weight = self.table.weight
        self.picks, self.times = picks, times
        self.double()

    def forward(self, ids):
        hidden, targets = torch.tanh(self.mix(self.table(ids))).cumsum(1)[:, :-1], ids[:, 1:]
        mask = labelled(ids)
        out = 0
        for _ in range(self.times):
            if self.picks:
                given = hidden[mask], self.head.weight, self.head.bias, targets[mask]
                logs, _, mean = LogProbs.apply(*given)
                logs = hidden.new_zeros(mask.shape).masked_scatter(mask, logs)
            else:
                given = hidden.reshape(-1, WIDTH), self.head.weight, self.head.bias
                logs, _, mean = LogProbs.apply(*given, targets.reshape(-1))
                logs = logs.view(mask.shape)
            out = out + logs
        assert not mean.requires_grad
        return out


def labelled(ids):
    return ids[:, 1:] % 3 > 0


def loss_of(out, labels):
    return -(out * (labels != -100)).sum() / (labels != -100).sum()


def batch(rows, seed, tokens=8):
    ids = torch.randint(VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return ids, ids[:, 1:].masked_fill(~labelled(ids), -100)


TRAIN, VALS = batch(4, 1), {"a": batch(2, 2), "b": batch(1, 3)}
MODELS = {
    "plain": {}, "picked": {"picks": True}, "bias": {"bias": True}, "tied": {"tied": True},
    "tied-picked": {"tied": True, "picks": True},
}  # fmt: skip


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """Every weight is one of which no row may have a gradient of its own; a bias may."""
    monkeypatch.setattr("graddot_lm.rules.general.LARGEST", 2 * VOCAB)


def attached(model, mode):
    if "given" not in mode:
        vals = VALS if "targets" in mode else VALS["a"]
        engine = GradDotProdEngine(
            model, vals, label_shift=0, norms="norms" in mode, per_parameter=True
        )
        engine.attach()
        return engine
    engine = GradDotProdEngine(model, label_shift=0, norms="norms" in mode, per_parameter=True)
    engine.attach()
    loss = lambda model, x, y: loss_of(model(x), y)
    engine.set_directions({k: engine.compute_directions([v], loss) for k, v in VALS.items()})
    return engine


def step(engine, model, data=TRAIN):
    engine.attach_train_batch(*data, 0, None)
    x, y = engine.prepare_forward_input(*data)
    engine.track_loss(loss_of(model(x), y)).backward()
    engine.prepare_gradients()


@pytest.mark.parametrize("mode", ["riding", "targets", "given", "targets-norms", "given-norms"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_every_row(kind, mode, dtype):
    model, exact = Model(**MODELS[kind]).to(dtype), Model(**MODELS[kind])
    vals = list(VALS.values()) if mode != "riding" else [VALS["a"]]
    found = [sample_dots(exact, TRAIN, val, loss_of) for val in vals]
    engine = attached(model, mode)
    for data in (TRAIN, batch(5, 9), TRAIN):  # others have other numbers of labels
        model.zero_grad()
        step(engine, model, data)
        dots = engine.parameter_dots()
        norms = engine.gradient_norms() if "norms" in mode else None
        scores = torch.atleast_2d(engine.aggregate_and_log())
        want = gradient(exact, *data, loss_of)
        for name, p in model.named_parameters():
            error = (p.grad.double() - want[name]).norm() / want[name].norm()
            assert error <= TOLERANCE[dtype], name
    for k, (want, scales) in enumerate(found):
        close(scores[k], total(want), TOLERANCE[dtype], total(scales))
        for name in want:
            close(torch.atleast_2d(dots[name])[k], want[name], TOLERANCE[dtype], scales[name])
    if norms is not None:
        close(norms, sample_norms(exact, TRAIN, loss_of), TOLERANCE[dtype])


@pytest.mark.parametrize("mode", ["targets-norms", "given"])
def test_no_copies_of_the_weight(mode, monkeypatch):
    """The peak of memory of a step, beside what there is before, in weights: of few rows and of many."""
    monkeypatch.setattr("test_row_gradients.VOCAB", 4000)
    monkeypatch.setattr("test_row_gradients.WIDTH", 256)
    model = Model().float()
    engine = attached(model, mode)
    step(engine, model, batch(4, 5))  # whose checks are done
    peaks = []
    for rows in (4, 24):
        model.zero_grad()
        with torch.profiler.profile(profile_memory=True) as profile:
            step(engine, model, batch(rows, rows))
        events = profile.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        weight = model.head.weight
        used = torch.tensor([size for _, size in changes]).cumsum(0).max().item()
        peaks.append(used / (weight.numel() * weight.itemsize))
    # 20 more rows of a few logits each; the gradients of both tables, and one row's, and directions.
    assert peaks[1] < peaks[0] + 2 < 12, peaks


def test_several_uses_are_refused():
    """Their cross terms are of row gradients that are not kept."""
    model = Model(times=2)
    engine = attached(model, "given")
    with pytest.raises(GraddotError, match="head.weight is used several times, in a function that"):
        step(engine, model)


class Picked(nn.Module):
    """What a mask picks, times a parameter: row i's entries are not those that are i-th in their number."""

    def __init__(self, scaled):
        super().__init__()
        self.gain, self.layer, self.scaled = nn.Parameter(torch.randn(6)), nn.Linear(6, 6), scaled

    def forward(self, x):
        mask, hidden = x[..., 0] > 0, self.layer(x)
        picked = 2 * hidden[mask] if self.scaled else hidden[mask]
        return torch.zeros_like(hidden).masked_scatter(mask[..., None], picked * self.gain).sum(1)


@pytest.mark.parametrize("scaled", [False, True])
def test_rows_of_what_a_mask_picks(scaled):
    """As many of every row is what a first batch may have, and a later one as many in all."""
    torch.manual_seed(0)
    x = torch.randn(4, 4, 6)
    x[..., 0] = torch.tensor([1.0, -1, 1, -1])
    model, loss = Picked(scaled).double(), nn.functional.mse_loss
    engine = GradDotProdEngine(model, label_shift=0)
    engine.attach()
    data = x.double(), torch.randn(4, 6).double()
    engine.set_directions(engine.compute_directions([data], lambda m, x, y: loss(m(x), y)))
    for uneven in (False, True):
        data[0][0, 1, 0], data[0][1, 0, 0] = (-1) ** (1 - uneven), (-1) ** uneven
        engine.attach_train_batch(*data, 0, None)
        if uneven:
            with pytest.raises(GraddotError, match="a mask picks out of the rows, which are more"):
                model(data[0])
        else:
            engine.track_loss(loss(model(data[0]), data[1])).backward()
            engine.prepare_gradients()
            engine.aggregate_and_log()


def test_a_proof_leaves_nothing_behind(monkeypatch):
    """Not its copies: a node that saves its own output, of which no backward runs, keeps itself."""
    monkeypatch.setattr("test_row_gradients.VOCAB", 29)
    step(attached(model := Model(), "given"), model, batch(4, 1))
    gc.collect()
    found = [x for x in gc.get_objects() if isinstance(x, nn.Parameter) and x.shape == (29, WIDTH)]
    assert {id(x) for x in found} == {id(model.table.weight), id(model.head.weight)}


class CallsItsHead(Model):
    def forward(self, ids):
        logs = self.head(torch.tanh(self.mix(self.table(ids)))).log_softmax(-1)
        return logs[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)


@pytest.mark.parametrize("ordered", [False, True])
def test_the_forward_that_stands_on_a_model_is_proven(ordered):
    """As TRL's, not its class's, which has no such function: here one that gets tokens in another order,
    and gives the same, but of other rows'."""

    def forward(self, ids):
        hidden, targets = torch.tanh(self.mix(self.table(ids)))[:, :-1].flatten(0, 1), ids[:, 1:]
        order = targets.flatten().argsort() if ordered else torch.arange(targets.numel())
        given = hidden[order], self.head.weight, None, targets.flatten()[order]
        return LogProbs.apply(*given)[0][order.argsort()].view(targets.shape)

    model = CallsItsHead()
    model.forward = MethodType(forward, model)
    engine = attached(model, "given")
    if ordered:
        with pytest.raises(GraddotError, match="the training gradient of head.weight differs"):
            step(engine, model)
    else:
        step(engine, model)
        want, scales = sample_dots(CallsItsHead(), TRAIN, VALS["a"], loss_of)
        close(engine.aggregate_and_log()[0], total(want), 1e-10, total(scales))


@pytest.mark.parametrize("given", [False, True])
def test_long_row_gradients(given):
    """All of one sign, as a head's for tokens that are no targets: added up one by one they lose digits."""
    g = torch.Generator().manual_seed(0)
    rows = 1 + torch.rand(3, 2**22, generator=g)
    if given:
        dots = products(rows[2:], rows[:2])
    else:
        dots = vector_form(rows, rows, [1], False)
    assert torch.allclose(
        dots.double(), rows[2:].double() @ rows[:2].double().t(), rtol=1e-6, atol=0
    )
