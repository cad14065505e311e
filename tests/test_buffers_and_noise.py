"""What a model keeps of one forward for the next, draws at random, or takes from the padding: no
trace of validation rows in it, and no sample that depends on another."""

import pytest
import torch
import torch.nn.functional as F
from brute_force import sample_dots, total
from graddot_lm import GraddotError, GradDotProdEngine
from net_steps import TRAIN, VAL, Net, X, Y, attached, plain_loss, step
from torch import nn


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


class Writing(nn.Module):
    """Its forward adds what it sees to a number that it keeps, by some way of writing, and looks at that."""

    def __init__(self, write):
        super().__init__()
        self.linear, self.write = nn.Linear(8, 3).double(), write
        self.register_buffer("mean", torch.zeros(8).double())
        self.register_buffer("number", torch.zeros((), dtype=torch.long))
        self.kept, self.named = [torch.zeros(8).double()], {"mean": torch.zeros(8).double()}
        self.teacher = nn.Parameter(torch.zeros(8).double(), requires_grad=False)

    def forward(self, x):
        known = self.mean + self.kept[0] + self.named["mean"] + self.teacher
        out = self.linear(x.mean(1) - known.detach().clone()) / (1 + self.number)
        with torch.no_grad():
            self.write(self, 0.1 * x.detach().mean((0, 1)))
        return out


def set_kept(m, x):
    m.kept[0] = m.kept[0] + x


def set_numbers(m, x):
    m.mean.numpy()[:] += x.numpy()


def count_rows(m, x):
    m.number += round(float(x.abs().sum() * 1e6))  # what no two batches have the same of


WRITTEN = {
    "buffer by data": (lambda m, x: m.mean.data.add_(x), "^buffer mean was changed by the forward"),
    "buffer by numpy": (set_numbers, "^buffer mean was changed by the forward"),
    "list": (set_kept, "^kept: changed by the forward, in which validation rows"),
    "list in place": (lambda m, x: m.kept[0].add_(x), "^kept: changed by the forward, in which"),
    "dict in place": (lambda m, x: m.named["mean"].add_(x), "^named: changed by the forward"),
    "count": (count_rows, "^buffer number was changed .* as a count of rows would be"),
}
FROZEN = {
    "in place": lambda m, x: m.teacher.add_(x),
    "by data": lambda m, x: m.teacher.data.add_(x),
    "another tensor": lambda m, x: setattr(m.teacher, "data", m.teacher.data + x),
}


@pytest.mark.parametrize("way", WRITTEN)
def test_however_a_forward_writes(way, close):
    """Beside validation rows it is refused; without them it is as in regular training, whatever the checks and
    directions ran."""
    write, message = WRITTEN[way]
    with pytest.raises(GraddotError, match=message):
        step(attached(Writing(write)), plain_loss)
    model, regular = Writing(write), Writing(write)
    regular.load_state_dict(model.state_dict())
    engine = GradDotProdEngine(model)
    engine.attach()
    loss = lambda m, x, y: F.cross_entropy(m(x), y)
    for number in range(3):
        engine.set_directions(engine.compute_directions([VAL], loss))
        step(engine, plain_loss, number=number)
        model.zero_grad()
        regular(TRAIN[0])
    assert torch.equal(model.mean, regular.mean) and torch.equal(model.number, regular.number)
    assert torch.equal(model.kept[0], regular.kept[0])
    assert torch.equal(model.named["mean"], regular.named["mean"])


@pytest.mark.parametrize("way", FROZEN)
@pytest.mark.parametrize("rides", [True, False])
def test_what_is_frozen_and_changed_by_the_forward_is_refused(way, rides):
    model = Writing(FROZEN[way])
    engine = attached(model) if rides else GradDotProdEngine(model)
    if not rides:
        engine.attach()
        directions = {n: torch.ones_like(p) for n, p in model.named_parameters() if n != "teacher"}
        engine.set_directions(directions)
    with pytest.raises(GraddotError, match="^teacher: frozen, but changed by the model's forward"):
        step(engine, plain_loss)


class Packed(torch.Tensor):
    """A weight in another form, as of a quantized model: no operation but to be detached."""

    @staticmethod
    def __new__(cls, whole):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=whole.dtype)

    def __init__(self, whole):
        self.whole = whole

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.detach.default:
            raise NotImplementedError(func)
        return cls(args[0].whole)


def test_a_frozen_weight_that_no_operation_reads(close):
    class Model(Net):
        def __init__(self):
            super().__init__()
            self.packed = nn.Parameter(Packed(torch.ones(8).double()), requires_grad=False)

        def forward(self, x):
            return super().forward(x * self.packed.whole)

    model, plain = Model(), Net()
    plain.load_state_dict({n: x for n, x in model.state_dict().items() if n != "packed"})
    close(step(attached(model), plain_loss), step(attached(plain), plain_loss), 1e-10)


def test_a_count_of_forwards_and_a_number_that_is_left_do_no_harm():
    def write(m, x):
        m.number += 1
        m.last, m.seen = len(x), [x]

    assert step(attached(Writing(write)), plain_loss).isfinite().all()


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


class Quantized(nn.Module):
    """A choice among vectors, by Gumbel noise, as wav2vec 2's quantizer makes it; mixes: of the sum of rows."""

    def __init__(self, hard, mixes):
        super().__init__()
        self.up, self.table = nn.Linear(8, 6).double(), nn.Linear(6, 8).double()
        self.head, self.hard, self.mixes = nn.Linear(8, 3).double(), hard, mixes

    def forward(self, x):
        logits = self.up(x)
        logits = logits.sum(0, keepdim=True).expand_as(logits) if self.mixes else logits
        return self.head(self.table(F.gumbel_softmax(logits, tau=2, hard=self.hard)).mean(1))


@pytest.mark.parametrize("hard", [False, True])
def test_a_choice_by_gumbel_noise(hard, close):
    model = Quantized(hard, mixes=False)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    engine = attached(model)
    got = step(engine, plain_loss)
    torch.set_rng_state(state)
    # All rows at once, for each draws noise of its own: the gradients by the weights of their losses.
    x, y = torch.cat([TRAIN[0], VAL[0]]), torch.cat([TRAIN[1], VAL[1]])
    losses = F.cross_entropy(model(x), y, reduction="none")
    of = lambda loss: torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
    val = of(losses[len(TRAIN[0]) :].mean())
    want = [sum((a * b).sum() for a, b in zip(of(loss), val, strict=True)) for loss in losses]
    close(got, torch.stack(want[: len(TRAIN[0])]), 1e-10)
    with pytest.raises(GraddotError, match="depends on other samples of the batch"):
        step(attached(Quantized(hard, mixes=True)), plain_loss)


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
