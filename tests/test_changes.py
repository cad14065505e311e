"""What changes around an engine, or beside it: layers unfrozen or replaced, running means, optimizer
steps in another order. Exact, or refused with the reason."""

import pytest
import torch
import torch.nn.functional as F
from brute_force import gradient, lm_loss, sample_dots, tiny_gpt2, token_batch, total
from graddot_lm import GraddotError, GradDotProdEngine
from loop_steps import Store, run, same_gradients
from torch import nn

X, Y = (
    torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0)).double(),
    torch.arange(6) % 3,
)
TRAIN, VAL = (X[:4], Y[:4]), (X[4:], Y[4:])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        return self.head(self.down(self.up(x).tanh()).tanh().mean(1))


def step(engine, loss_of, factor=1.0, number=0, track=True, train=TRAIN, model=None):
    """One step with a loss made of the model's output; its scores."""
    engine.attach_train_batch(*train, number, torch.arange(4))
    x, y = engine.prepare_forward_input(*train)
    loss = loss_of(engine.model if model is None else model, x, y)
    ((engine.track_loss(loss) if track else loss) * factor).backward()
    engine.prepare_gradients()
    return engine.aggregate_and_log()


def plain_loss(model, x, y):
    return F.cross_entropy(model(x), y)


def attached(model, optimizer=None, val=VAL, **options):
    engine = GradDotProdEngine(model, val, **options)
    engine.attach(optimizer)
    return engine


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


# Buffers and noise


class Normaliser(nn.Module):
    """Scales by a running mean, which it updates."""

    def __init__(self, floating):
        super().__init__()
        self.linear = nn.Linear(8, 3).double()
        self.register_buffer("mean", torch.ones(8).double())
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.floating = floating

    def forward(self, x):
        out = self.linear(x.mean(1) / self.mean)
        self.steps += 1
        if self.floating:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().abs().mean((0, 1))
        return out


def test_a_running_mean_that_would_see_validation_rows_is_refused():
    with pytest.raises(GraddotError, match="buffer mean was changed by the forward, in which"):
        step(attached(Normaliser(True)), plain_loss)


def test_the_checks_leave_no_trace_in_buffers():
    model, alone = Normaliser(False), Normaliser(True)
    step(attached(model), plain_loss)
    assert model.steps == 1
    engine = GradDotProdEngine(alone)
    engine.attach()
    engine.set_directions({n: torch.ones_like(p) for n, p in alone.named_parameters()})
    step(engine, plain_loss)
    assert alone.steps == 1
    torch.testing.assert_close(alone.mean, 0.9 + 0.1 * TRAIN[0].abs().mean((0, 1)))


class Remembering(nn.Module):
    """Keeps tensors in attributes, and uses one of them in its next forward."""

    def __init__(self, what, in_place=False):
        super().__init__()
        self.linear = nn.Linear(8, 3).double()
        self.what, self.in_place, self.calls, self.map = what, in_place, 0, None
        if what == "zeros":
            self.mean = torch.zeros(8).double()

    def forward(self, x):
        self.calls += 1
        mean = getattr(self, "mean", torch.zeros(())).clone() if self.what else 0
        now = x.detach().mean((0, 1))
        if self.in_place:
            self.mean.copy_(now)
        else:
            self.mean = now
        self.map = self.linear(x + mean)
        return self.map.mean(1) * (1 + self.calls)


@pytest.mark.parametrize(
    "model", [Remembering("zeros"), Remembering("zeros", True), Remembering("new")]
)
def test_what_a_model_remembers_of_validation_rows_is_refused(model):
    mean = getattr(model, "mean", None)
    with pytest.raises(GraddotError, match="^map, mean: changed by the forward, in which valid"):
        step(attached(model), plain_loss)
    assert (
        model.calls == 1 and (model.mean is mean) == model.in_place
    )  # of the one forward of the step


def test_what_is_kept_to_be_looked_at_and_counts_do_no_harm(close):
    model = Remembering("")
    engine = attached(model)
    for number in (1, 2):
        # The copy that runs alone counts one forward more, and scales by it.
        loss = lambda out, y, k=number: F.cross_entropy(out / (2 + k) * (1 + k), y)
        model.calls = number
        model.map = None  # which has a graph, and so no copy
        want = total(sample_dots(model, TRAIN, VAL, loss=loss)[0])
        model.calls = number - 1
        close(step(engine, plain_loss, number=number), want, 1e-10)
        assert model.calls == number


class Noisy(Net):
    def __init__(self, mix):
        super().__init__()
        self.mix = mix

    def forward(self, x):
        return super().forward(self.mix(x))


MIXES = {
    "mixup": lambda x: 0.7 * x + 0.3 * x[torch.randperm(len(x))],
    "centred": lambda x: x - x.mean(0) + 0.1 * torch.randn_like(x),
    "drawn": lambda x: x + x[torch.randint(0, len(x), (len(x),))],
    "normal": lambda x: x - x.mean(0) + torch.empty_like(x).normal_(),
}


@pytest.mark.parametrize("mix", MIXES)
def test_mixed_samples_are_found_behind_noise(mix):
    with pytest.raises(GraddotError, match="depends on other samples of the batch"):
        step(attached(Noisy(MIXES[mix])), plain_loss)


class Sampled(nn.Module):
    """A latent vector (rows, d) with noise in it, as a variational encoder has."""

    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(8, 8).double(), nn.Linear(8, 3).double()

    def forward(self, x):
        h = self.up(x.mean(1))
        return self.head(h + 0.1 * torch.randn_like(h))


def test_noise_before_a_layer_of_two_dimensions():
    assert step(attached(Sampled()), plain_loss).isfinite().all()


class Mean(Net):
    """Takes the mean over all tokens, padding too."""

    def __init__(self, heeds):
        super().__init__()
        self.heeds = heeds

    def forward(self, x):
        used = (x != 0).any(-1, keepdim=True) if self.heeds else torch.ones_like(x[..., :1])
        return self.head((self.up(x).tanh() * used).sum(1) / used.sum(1))


@pytest.mark.parametrize("longer", ["train", "val"])
def test_padding_that_the_model_looks_at_is_refused(longer, close):
    short = X[:, :3]
    x, x_val = (X[:4], short[4:]) if longer == "train" else (short[:4], X[4:])
    for heeds in (True, False):
        model = Mean(heeds)
        train, val = (x, Y[:4]), (x_val, Y[4:])
        engine = GradDotProdEngine(model, val, padding={"inputs": 0})
        engine.attach()
        engine.attach_train_batch(*train, 0, None)
        joint, y = engine.prepare_forward_input(*train)
        if heeds:
            dots, scales = sample_dots(Mean(True), train, val, loss=F.cross_entropy)
            engine.track_loss(F.cross_entropy(model(joint), y)).backward()
            engine.prepare_gradients()
            close(engine.aggregate_and_log(), total(dots), 1e-10, total(scales))
        else:
            with pytest.raises(GraddotError, match="length 3 that were filled up to 5 change what"):
                model(joint)


# Labels


class Pixels(nn.Module):
    """Classes in the second dimension of what it returns, as segmentation has them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 3, 1).double()

    def forward(self, x):
        return self.conv(x.transpose(1, 2))


def test_an_ignored_label_is_noticed_where_classes_come_second():
    labels = torch.arange(30).view(6, 5) % 3
    labels[1, 2:] = 255
    engine = GradDotProdEngine(Pixels(), (X[4:], labels[4:]))
    engine.attach()
    engine.attach_train_batch(X[:4], labels[:4], 0, None)
    F.cross_entropy(engine.model(X), labels, ignore_index=255).backward()
    with pytest.raises(GraddotError, match="row 1 of the batch has 5 labelled tokens.*used 2"):
        engine.prepare_gradients()


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
        for step in range(2):
            for number in (0, 1):
                train = token_batch(2, 9, seed=2 * step + number)
                engine.attach_train_batch(*train, step, None)
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


# A backward that raises, tokens without a gradient, tokens picked by their values


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


def test_samples_beyond_the_margin_of_a_hinge_loss(close):
    """They get a gradient of 0, which is no sign of labels that the loss ignores."""
    model = Net()
    engine = attached(model)
    loss = lambda out, y: F.multi_margin_loss(out, y, margin=0.2)
    loss_of = lambda model, x, y: loss(model(x), y)
    with torch.no_grad():
        model.head.weight.mul_(0.05)
        model.head.bias.zero_()
    for number in range(10):
        step(engine, loss_of, number=number)
    with torch.no_grad():
        model.head.weight.mul_(200)
    dots, scales = sample_dots(model, TRAIN, VAL, loss=loss)
    scores = step(engine, loss_of, number=10)
    assert 0 < (scores == 0).sum() < 4
    close(scores, total(dots), 1e-10, total(scales))


@pytest.mark.parametrize("ignored", [False, True])
def test_tokens_whose_gradient_rounds_to_zero(close, ignored):
    """They are predicted with certainty; what the loss ignores beside them is still found."""
    model, val = tiny_gpt2().double(), token_batch(1, 9, seed=2)
    x, y = token_batch(3, 9, seed=1)
    engine = GradDotProdEngine(model, val, label_shift=1)
    engine.attach()
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1e4)
        y[:, 1:4] = model(x).logits[:, :3].argmax(-1)

    def loss(logits, y):
        labels = y[:, 1:]
        labels = torch.where(labels == y[0, -1], -100, labels) if ignored else labels
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())

    def run_step():
        engine.attach_train_batch(x, y, 0, None)
        joint, labels = engine.prepare_forward_input(x, y)
        logits = model(joint).logits
        logits.retain_grad()
        engine.track_loss(loss(logits, labels)).backward()
        engine.prepare_gradients()
        return engine.aggregate_and_log(), (logits.grad == 0).all(-1)

    if ignored:
        with pytest.raises(GraddotError, match="but the loss used"):
            run_step()
        return
    dots, scales = sample_dots(model, (x, y), val, loss=loss)
    scores, idle = run_step()
    close(scores, total(dots), 1e-9, total(scales))
    assert idle[:3, :3].any()


class Picked(nn.Module):
    """Predicts the tokens that are masked, 0, and looks at no other."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)
        self.double()

    def forward(self, ids):
        hidden = self.embed(ids).cumsum(1)
        return self.head(hidden[ids == 0])


@pytest.mark.parametrize(
    ("masked", "reason"),
    [
        ((2, 2, 2, 2), "layer head gets tokens that are picked by their values"),
        ((1, 1, 1, 1), "layer head gets tokens that are picked by their values"),
        ((2, 0, 1, 1), "layer head gets an input .* does not hold them one after the other"),
    ],
    ids=str,
)
def test_tokens_picked_by_their_values_are_refused(masked, reason):
    """Also where there is one a row, or as many as if there were."""
    model = Picked()
    ids = torch.randint(1, 9, (4, 6))
    for row, number in zip(ids, masked, strict=True):
        row[1 : 1 + number] = 0
    engine = GradDotProdEngine(model, (ids[3:], ids[3:]))
    engine.attach()
    engine.attach_train_batch(ids[:3], ids[:3], 0, None)
    with pytest.raises(GraddotError, match=reason):
        model(ids)


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
