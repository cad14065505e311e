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
