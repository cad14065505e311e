"""Comparison of the Triton launchers with the float64 reference, on any device.

Tolerances are backward-error bounds. Products of two fp32 or 16-bit numbers are summed in fp32,
so an element's error is a few units of 2⁻²⁴ times the sum of its terms' magnitudes: a weight
gradient's of Σ|b||a|, a dot's of ‖D‖ Σ_t ‖b_t‖‖a_t‖. The inputs are rounded before the reference
sees them, so the dtype of the inputs does not appear. tf32 keeps 11 bits of every factor.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from graddot_kernels import reference

FP32_ERROR = 1e-6
TF32_ERROR = 2e-3


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Pytest's monkeypatch cannot: torch.backends has no such attributes to be put back."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [x.allow_tf32 for x in settings]
    try:
        for x in settings:
            x.allow_tf32 = allowed
        yield
    finally:
        for x, value in zip(settings, before, strict=True):
            x.allow_tf32 = value


def random(*shape: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7919 * sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float32).to(device, dtype)


def inputs(n: int, t: int, d_in: int, d_out: int, **kwargs) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    return random(n, t, d_in, **kwargs), random(n, t, d_out, **(kwargs | {"seed": 1}))


def assert_within(got: Tensor, want: Tensor, bound: Tensor, tolerance: float) -> None:
    """|got - want| ≤ tolerance · bound everywhere; names the first element where it is not."""
    assert got.shape == want.shape
    got, want = got.double().cpu(), want.double().cpu()
    limit = tolerance * bound.double().cpu().expand_as(want)
    bad = ~((got - want).abs() <= limit)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} outside; first at {at}: got {got[at]:.6g}, "
            f"expected {want[at]:.6g} ± {limit[at]:.2g}"
        )


def token_norms(act: Tensor, grad: Tensor) -> Tensor:
    """‖b_it‖‖a_it‖, (N, T)."""
    return act.double().norm(dim=2) * grad.double().norm(dim=2)


def check_gram(
    got: Tensor, val_act: Tensor, val_grad: Tensor, act: Tensor, grad: Tensor, pairwise: bool,
    tolerance: float = FP32_ERROR,
) -> None:  # fmt: skip
    doubles = (x.double() for x in (val_act, val_grad, act, grad))
    want = reference.linear_gram_dot(*doubles, pairwise)
    bound = token_norms(val_act, val_grad).sum(1)[:, None] * token_norms(act, grad).sum(1)
    assert_within(got, want, bound if pairwise else bound.sum(0), tolerance)


def check_direction(
    got: Tensor, direction: Tensor, act: Tensor, grad: Tensor, per_token: bool,
    tolerance: float = FP32_ERROR,
) -> None:  # fmt: skip
    want = reference.linear_direction_dot(
        direction.double(), act.double(), grad.double(), per_token
    )
    tokens = direction.double().flatten(1).norm(dim=1)[:, None, None] * token_norms(act, grad)
    assert_within(got, want, tokens if per_token else tokens.sum(2), tolerance)


def check_squares(got: Tensor, act: Tensor, grad: Tensor, tolerance: float = FP32_ERROR) -> None:
    """‖G_i‖², (N,)."""
    want = reference.linear_sample_grads(act.double(), grad.double()).square().sum((1, 2))
    assert_within(got, want, token_norms(act, grad).sum(1).square(), tolerance)


def check_wgrad(
    weight_grad: Tensor, dots: Tensor, direction: Tensor, act: Tensor, grad: Tensor,
    scale: Tensor | None = None, before: Tensor | None = None, tolerance: float = FP32_ERROR,
) -> None:  # fmt: skip
    """before: what an accumulating call found in weight_grad."""
    scale = None if scale is None else scale.double()
    want, _ = reference.linear_wgrad_dot(direction.double(), act.double(), grad.double(), scale)
    magnitude, _ = reference.linear_wgrad_dot(
        direction.double(), act.double().abs(), grad.double().abs(), scale
    )
    if before is not None:
        want, magnitude = want + before.double(), magnitude.abs() + before.double().abs()
    # The buffer's own rounding: one unit in its last place.
    rounding = torch.finfo(weight_grad.dtype).eps * want.abs()
    assert_within(weight_grad, want, tolerance * magnitude.abs() + rounding, 1.0)
    check_direction(dots, direction, act, grad, False, tolerance)


def check_norm(
    got: tuple[Tensor, Tensor], x: Tensor, grad: Tensor, *statistics: Tensor | None
) -> None:
    """statistics: mean and rstd, where x is not normalised."""
    exact = [None if y is None else y.double() for y in statistics]
    weight, bias = reference.norm_sample_grads(x.double(), grad.double(), *exact)
    mean, rstd = (None if y is None else y.abs() for y in exact or (None, None))
    mean = None if mean is None else -mean
    magnitude = reference.norm_sample_grads(x.double().abs(), grad.double().abs(), mean, rstd)
    assert_within(got[0], weight, magnitude[0], FP32_ERROR)
    assert_within(got[1], bias, magnitude[1], FP32_ERROR)
