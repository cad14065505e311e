"""What changes around an engine, or beside it: layers unfrozen or replaced, optimizer steps in
another order, arguments of another kind. Exact, or refused with the reason."""

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, lm_loss, sample_dots, tiny_gpt2, token_batch, total
from graddot_lm import GraddotError, GradDotProdEngine
from loop_steps import Store, run, same_gradients
from net_steps import TRAIN, VAL, Net, X, Y, attached, plain_loss, step
from torch import nn

# Layers and parameters


def _unfreeze(model):
    model.down.requires_grad_(True)


def _replace(model):
    model.head = nn.Linear(8, 3).double()


def _replace_frozen(model):
    model.down = nn.Linear(8, 8).double().requires_grad_(False)


def _add(model):
    model.more = nn.Linear(8, 8).double()


CHANGES = {
    "unfrozen": (_unfreeze, r"down.weight, down.bias: not a trainable parameter of the model when"),
    "replaced": (_replace, "head.weight, head.bias: not a trainable parameter"),
    "added": (_add, "more.weight, more.bias: not a trainable parameter"),
}


@pytest.mark.parametrize("when", ["attached", "later"])
@pytest.mark.parametrize("change", CHANGES)
def test_parameters_that_were_not_there_are_refused(change, when):
    model = Net()
    model.down.requires_grad_(False)
    engine = attached(model)
    if when == "later":
        step(engine, plain_loss)
    function, words = CHANGES[change]
    function(model)
    with pytest.raises(GraddotError, match=words):
        step(engine, plain_loss, number=1)
    engine.detach()
    with pytest.raises(GraddotError, match="make another|is new since|make it last"):
        engine.attach()


def test_a_scored_layer_that_is_gone_is_refused():
    model = Net()
    engine = attached(model)
    _replace_frozen(model)
    with pytest.raises(GraddotError, match="a Linear that was scored is no longer in the model"):
        step(engine, plain_loss)


def test_an_optimizer_of_parameters_outside_of_the_model_is_refused():
    model, criterion = Net(), nn.Linear(3, 3)
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1)
    with pytest.raises(GraddotError, match="2 parameters that are not in the engine's model"):
        attached(model, optimizer)


def test_an_optimizer_that_gets_other_parameters_later_is_refused():
    model, criterion = Net(), nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = attached(model, optimizer)
    step(engine, plain_loss)
    optimizer.add_param_group({"params": criterion.parameters()})
    with pytest.raises(GraddotError, match="2 parameters that are not in the engine's model"):
        step(engine, plain_loss)


def test_an_optimizer_of_a_part_of_the_model_is_refused():
    model = Net()
    optimizer = torch.optim.SGD(model.down.parameters(), lr=0.1)
    with pytest.raises(GraddotError, match=r"does not update up.weight, .*\(4 of 6 scored"):
        attached(model, optimizer)
    excluded = [f"{part}.{name}" for part in ("up", "head") for name in ("weight", "bias")]
    attached(model, optimizer, exclude=excluded).detach()
    with pytest.raises(GraddotError, match="attach got a dict; expected an optimizer"):
        attached(model, {"adam": optimizer})


def test_a_model_on_several_devices_is_refused():
    model = Net()
    model.head.to("meta")
    with pytest.raises(GraddotError, match="parameters are on cpu and meta, .* DDP or FSDP2"):
        attached(model)


class Later(nn.Module):
    """Its second layer runs from the second step on; with time first, T as large as the rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.up, self.more, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.deep, self.calls = False, [0]
        self.double()

    def forward(self, x):
        self.calls[0] += 1
        h = self.up(x.transpose(0, 1)).tanh()
        if self.deep:
            h = self.more(h.cumsum(0)).tanh()
        return self.head(h.mean(0))


def test_a_layer_that_runs_later_with_time_first(close):
    model, x, y = Later(), torch.randn(6, 6, 8).double(), Y
    engine = GradDotProdEngine(model, (x[4:], y[4:]))
    engine.attach()
    for number, model.deep in enumerate((False, True, True)):
        loss = lambda out, y: F.cross_entropy(out, y)
        if not model.deep:
            engine.attach_train_batch(x[:4], y[:4], number, None)
            engine.track_loss(F.cross_entropy(model(x), y)).backward()
            engine.prepare_gradients()
            engine.aggregate_and_log()
            continue
        dots, scales = sample_dots(model, (x[:4], y[:4]), (x[4:], y[4:]), loss=loss)
        want = gradient(model, x[:4], y[:4], loss=loss)
        model.zero_grad()
        engine.attach_train_batch(x[:4], y[:4], number, None)
        engine.track_loss(F.cross_entropy(model(x), y)).backward()
        engine.prepare_gradients()
        close(engine.aggregate_and_log(), total(dots), 1e-10, total(scales))
        same_gradients(model, want, 1e-10)
    before = model.calls[0]
    step(engine, plain_loss, number=3, train=(x[:4], y[:4]))
    assert model.calls[0] == before + 1  # what was learnt late is known


# The optimizer's step


@pytest.mark.parametrize("option", ["norms", "per_token", "per_parameter"])
def test_what_is_read_before_the_step_is_closed(option):
    """Of all samples whose backward ran: the last micro-batch's, too, and none of the step before."""
    read = {
        "norms": lambda engine: [engine.gradient_norms(), engine.cosines(), engine.target_norms()],
        "per_token": lambda engine: [engine.token_dots()],
        "per_parameter": lambda engine: [*engine.parameter_dots().values()],
    }[option]
    model, found = tiny_gpt2(), []
    directions = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for closed in (True, False):
        engine = GradDotProdEngine(model, label_shift=1, **{option: True})
        engine.attach()
        engine.set_directions(directions)
        for i in range(2):
            for number in (0, 1):
                train = token_batch(2, 9, seed=2 * i + number)
                engine.attach_train_batch(*train, i, None)
                engine.track_loss(lm_loss(model(train[0]).logits, train[1])).backward()
                if closed or number == 0:
                    engine.prepare_gradients()
            found.append(read(engine))
            assert len(engine.aggregate_and_log()) == 4
        engine.detach()
    for got, want in zip(found[2:], found[:2], strict=True):
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("closes", ["before", "after", "never"])
def test_values_wherever_the_step_is_closed(closes):
    model, val, store = tiny_gpt2(), token_batch(1, 9, seed=2), Store()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine = GradDotProdEngine(model, val, label_shift=1, store=store)
    engine.attach(optimizer)
    train = token_batch(3, 9, seed=1)
    for number in range(2):
        engine.attach_train_batch(*train, number, torch.arange(3))
        x, y = engine.prepare_forward_input(*train)
        engine.track_loss(lm_loss(model(x).logits, y)).backward()
        if closes == "before":
            engine.prepare_gradients()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 7.0  # as of a scheduler
        if closes == "after":
            engine.prepare_gradients()
        scores = engine.aggregate_and_log()
        optimizer.zero_grad()
        torch.testing.assert_close(store.column("value"), scores * 0.5 / 3)
        optimizer.param_groups[0]["lr"] = 0.5


def test_values_logged_before_an_accumulated_step_are_refused():
    model, val = tiny_gpt2(), token_batch(1, 9, seed=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine = GradDotProdEngine(model, val, label_shift=1, store=Store())
    engine.attach(optimizer)
    run(engine, token_batch(2, 9, seed=1))
    engine.aggregate_and_log()
    with pytest.raises(GraddotError, match="its gradients are still there"):
        run(engine, token_batch(2, 9, seed=3))


@pytest.mark.parametrize("of", ["grad", "detached", "flat", "weights"])
def test_a_direction_that_is_a_gradient_is_copied(of):
    """Or a view of one, or the weights themselves."""
    model = Net()
    plain_loss(model, *VAL).backward()
    engine = GradDotProdEngine(model)
    engine.attach()
    take = {
        "grad": lambda p: p.grad,
        "detached": lambda p: p.grad.detach(),
        "flat": lambda p: p.grad.flatten().view_as(p),
        "weights": lambda p: p.detach(),
    }[of]
    direction = {n: take(p) for n, p in model.named_parameters()}
    kept = {n: d.clone() for n, d in direction.items()}
    engine.set_directions(direction)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    model.zero_grad(set_to_none=False)
    got = step(engine, plain_loss)
    engine.set_directions(kept)
    model.zero_grad(set_to_none=False)
    assert (got != 0).all() and torch.equal(step(engine, plain_loss), got)
    whole = {n: torch.ones_like(p, dtype=torch.long) for n, p in model.named_parameters()}
    with pytest.raises(GraddotError, match="floating-point"):
        engine.set_directions(whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_direction_that_is_not_finite_is_refused(bad):
    model = Net()
    engine = GradDotProdEngine(model)
    direction = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    direction["up.weight"][1, 2] = bad
    with pytest.raises(GraddotError, match=r"up\.weight has NaN or infinite"):
        engine.set_directions(direction)


# A backward that raises


def test_a_backward_that_raised_has_no_scores(close):
    model = Net()
    engine = attached(model)

    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("out of memory")

    handle = model.down.register_forward_pre_hook(lambda module, args: Explode.apply(*args))
    with pytest.raises(RuntimeError, match="out of memory"):
        step(engine, plain_loss)
    with pytest.raises(GraddotError, match="the backward pass raised before it was through"):
        engine.aggregate_and_log()
    engine.clear_gradients()
    handle.remove()
    dots, scales = sample_dots(model, TRAIN, VAL, loss=F.cross_entropy)
    close(step(engine, plain_loss, number=1), total(dots), 1e-10, total(scales))


# Arguments of another kind


def directions(model, loss_fn=None):
    return lambda: GradDotProdEngine(model).compute_directions([VAL], loss_fn)


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.LazyLinear(3)


WRONG = {
    "array": (
        lambda: attached(Net(), val=(X.numpy(), Y)),
        "inputs of type ndarray; expected a ten",
    ),
    "list": (lambda: attached(Net(), val=(X.tolist(), Y)), "inputs of type list"),
    "array-of-labels": (
        lambda: attached(Net(), val=(X, Y.numpy())),
        "labels = a ndarray; expected",
    ),
    "lazy": (lambda: GradDotProdEngine(Lazy(), VAL), "head.weight, head.bias: not there before"),
    "no-module": (lambda: GradDotProdEngine("gpt2", VAL), "the model is a str"),
    "exclude": (
        lambda: GradDotProdEngine(Net(), VAL, exclude="up.weight"),
        "is 'up.weight'; expect",
    ),
    "no-loss": (directions(Net()), "the model takes no labels .*; pass loss_fn"),
    "losses": (
        directions(Net(), lambda m, x, y: F.cross_entropy(m(x), y, reduction="none")),
        r"loss_fn returned a tensor of shape \(2,\)",
    ),
    "number": (directions(Net(), lambda m, x, y: 1.0), "loss_fn returned a float"),
    "detached": (
        directions(Net(), lambda m, x, y: plain_loss(m, x, y).detach()),
        "requires_grad=False; expected one number with a gradient",
    ),
    "arrays": (
        lambda: GradDotProdEngine(Net()).set_directions({"up.weight": X.numpy()}),
        "directions are neither all tensors",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_an_argument(name):
    make, message = WRONG[name]
    with pytest.raises(GraddotError, match=message):
        make()


def test_directions_without_gradients_around():
    """As in an evaluation: what is computed is a gradient all the same."""
    model = Net()
    want = directions(model, plain_loss)()
    with torch.no_grad():
        got = directions(model, plain_loss)()
    assert all(torch.equal(got[name], want[name]) for name in want)
