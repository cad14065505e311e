"""What tests of an engine share: its step, comparisons with brute force, small models."""

import copy

import torch
from brute_force import gradient, lm_loss, sample_dots, total
from graddot_lm import GradDotProdEngine
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Relative error of a dot; the denominator is at least a tenth of the Cauchy-Schwarz scale
# ‖D‖·‖G_i‖, which is what rounding errors of activations and gradients are proportional to: a dot
# of two nearly orthogonal gradients has no relative accuracy in any fp32 computation.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def run_step(model, train, val, *, loss=lm_loss, factor=1.0, label_shift=1, **kwargs):
    """Scores and dots by parameter of one step; .grad is left on the model."""
    model.zero_grad(set_to_none=True)
    engine = GradDotProdEngine(model, val, label_shift=label_shift, per_parameter=True, **kwargs)
    engine.attach()
    engine.attach_train_batch(*train, 0, torch.arange(len(train[0])))
    x, y = engine.prepare_forward_input(*train)
    out = model(x)
    total = loss(getattr(out, "logits", out), y)
    (engine.track_loss(total) * factor).backward()
    engine.prepare_gradients()
    dots = engine.parameter_dots()
    scores = engine.aggregate_and_log()
    engine.detach()
    return scores, dots


def close(got, want, tolerance, scale=None):
    scale = want.abs() if scale is None else torch.maximum(want.abs(), 0.1 * scale)
    error = ((got.double() - want).abs() / scale.clamp(min=1e-30)).max().item()
    assert error <= tolerance, f"relative error {error:.1e} > {tolerance:.0e}"


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def check_against_brute_force(model, train, val, dtype, *, loss=lm_loss, label_shift=1):
    want, scales = sample_dots(model, train, val, loss=loss)
    want_grad = gradient(model, *train, loss=loss)
    model = copy.deepcopy(model).to(dtype)
    if train[0].is_floating_point():
        train, val = (train[0].to(dtype), train[1]), (val[0].to(dtype), val[1])
    scores, dots = run_step(model, train, val, loss=loss, label_shift=label_shift)
    close(scores, total(want), TOLERANCE[dtype])
    for name, dot in dots.items():
        close(dot, want[name], TOLERANCE[dtype], scales[name])
    # A sample's dots by parameter as one vector: relative error in norm, whatever the angles.
    got, exact = torch.stack([*dots.values()]).double(), torch.stack([want[n] for n in dots])
    assert ((got - exact).norm(dim=0) <= TOLERANCE[dtype] * exact.norm(dim=0)).all()
    for name, p in model.named_parameters():
        error = (p.grad.double() - want_grad[name]).norm() / want_grad[name].norm()
        assert error <= TOLERANCE[dtype], name


class MLP(nn.Module):
    def __init__(self, conv1d=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(12, 20),
            nn.GELU(),
            nn.LayerNorm(20),
            Conv1D(20, 20) if conv1d else nn.Linear(20, 20, bias=False),
            nn.Tanh(),
            nn.Linear(20, 7),
        )

    def forward(self, x):
        return self.net(x)


class SharedEverything(nn.Module):
    """A weight used by two embeddings and a head, a linear layer and a norm called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.source, self.target = nn.Embedding(30, 10, padding_idx=3), nn.Embedding(30, 10, 3)
        self.mix, self.norm = nn.Linear(10, 10), nn.LayerNorm(10)
        self.head = nn.Linear(10, 30, bias=False)
        self.target.weight = self.source.weight
        self.head.weight = self.source.weight

    def forward(self, ids):
        x = self.source(ids) + 0.5 * self.target((7 * ids + 1) % 30)
        x = torch.tanh(self.mix(self.norm(x)))
        return self.head(torch.tanh(self.mix(self.norm(x))))
