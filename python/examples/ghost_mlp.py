"""The minimal example: an MLP on synthetic data, dots by parameter for ten steps.

Every step's dots are checked against autograd: one backward a sample, in float64.
"""

import copy

import torch
import torch.nn.functional as F
from graddot_lm import GradDotProdEngine
from torch import Tensor, nn


def autograd_dots(model: nn.Module, train: tuple, val: tuple) -> dict[str, Tensor]:
    """⟨∇L_val, ∇L_i⟩ by parameter, (N,) each, the slow way."""
    exact = copy.deepcopy(model).double()
    parameters = dict(exact.named_parameters())

    def gradient(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(exact(x.double()), y)
        return torch.autograd.grad(loss, list(parameters.values()))

    val_grads = gradient(*val)
    samples = [gradient(train[0][i : i + 1], train[1][i : i + 1]) for i in range(len(train[0]))]
    return {
        name: torch.stack([(sample[p] * val_grads[p]).sum() for sample in samples])
        for p, name in enumerate(parameters)
    }


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(),
        nn.Linear(64, 4),
    )  # fmt: skip
    teacher = torch.randn(16, 4)
    draw = lambda n: (x := torch.randn(n, 16), (x @ teacher).argmax(1))
    val = draw(32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = GradDotProdEngine(model, val, per_parameter=True)
    engine.attach(optimizer)
    for step in range(10):
        x, y = draw(8)
        y[0] = (y[0] + 1) % 4  # a wrong label: its score should be low
        want = autograd_dots(model, (x, y), val)
        engine.attach_train_batch(x, y, step, torch.arange(8))
        X, Y = engine.prepare_forward_input(x, y)
        engine.track_loss(F.cross_entropy(model(X), Y)).backward()
        engine.prepare_gradients()
        dots = engine.parameter_dots()
        optimizer.step()
        scores = engine.aggregate_and_log()
        optimizer.zero_grad(set_to_none=True)
        worst = max(((dots[n] - w).abs() / w.abs().max()).max().item() for n, w in want.items())
        print(f"step {step}: scores {' '.join(f'{s:+.4f}' for s in scores.tolist())}")
        for name, dot in dots.items():
            print(f"    {name:10} {' '.join(f'{d:+.4f}' for d in dot.tolist())}")
        print(f"    largest relative difference from autograd: {worst:.1e}")
        assert worst < 1e-4, "dots differ from autograd"
    engine.detach()


if __name__ == "__main__":
    main()
