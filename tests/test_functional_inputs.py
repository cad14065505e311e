"""What the linear and norm functions take: buffers of any dtype and strides, in memory of an input
too; inputs of every dtype, that require a gradient, under autocast; a sample that outweighs others."""

import itertools
from collections.abc import Callable

import pytest
import torch
from kernel_checks import (
    assert_within,
    check_direction,
    check_squares,
    check_wgrad,
)
from linear_problems import DTYPES, Problem, each_count, joint, make
from torch import Tensor

import graddot_kernels as gk
from graddot_kernels import reference

__all__ = ["each_count"]  # the fixture


def buffer(form: str, *shape: int) -> Tensor:
    """Ones of a dtype and layout, and NaN beside them where there is room."""
    dtype = DTYPES.get(form, torch.float32)
    if form == "transposed":
        return torch.ones(*reversed(shape)).t()
    if form == "sliced":
        return torch.full([2 * size for size in shape], torch.nan)[
            (slice(1, None, 2),) * len(shape)
        ].fill_(1)
    return torch.ones(*shape, dtype=dtype)


@pytest.mark.parametrize("t", [5, 41], ids=["direction", "fused"])
@pytest.mark.parametrize("form", [*DTYPES, "transposed", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wgrad_dot_into_buffers_of_any_dtype_and_strides(dtype: str, form: str, t: int) -> None:
    p = make(t=t, dtype=dtype)
    act, grad = p.act.double(), p.grad.double()
    bias = grad.sum(1)
    size = grad.abs().sum(1)  # the terms' magnitudes
    bias_direction = p.direction[:, :, 0]
    scale = torch.tensor(0.3)
    for accumulate, several in itertools.product((False, True), repeat=2):
        weight_grad, bias_grad = buffer(form, 17, 13), buffer(form, 17)
        before = weight_grad.clone()
        k = slice(None) if several else 0
        got = gk.linear_wgrad_dot_into(
            weight_grad, p.direction[k], p.act, p.grad, bias_grad=bias_grad,
            bias_direction=bias_direction[k], scale=scale, accumulate=accumulate,
        )  # fmt: skip
        weight_direction = p.direction[k].view(-1, 17, 13)
        own = gk.linear_wgrad_dot_into(weight_grad.clone(), p.direction[k], p.act, p.grad)
        check_wgrad(
            weight_grad, own.view(-1, 5), weight_direction, p.act, p.grad, scale,
            before if accumulate else None, p.tolerance,
        )  # fmt: skip
        total = float(scale) * bias.sum(0) + (1 if accumulate else 0)
        rounding = torch.finfo(bias_grad.dtype).eps * total.abs()
        assert_within(bias_grad, total, p.tolerance * (size.sum(0) + 1) + rounding, 1.0)
        # The bias is one more column of the weight, with inputs of 1.
        wide = torch.cat([act, torch.ones_like(act[..., :1])], 2)
        column = bias_direction[k].view(-1, 17, 1)
        whole = torch.cat([weight_direction, column], 2)
        check_direction(got.view(-1, 5), whole, wide, grad, False, p.tolerance)
        both = gk.linear_wgrad_dot_into(
            buffer(form, 17, 13), p.direction[k], p.act, p.grad,
            bias_direction=bias_direction[k], norms=True,
        )  # fmt: skip
        assert torch.equal(both[:-1], got.view(-1, 5))
        check_squares(both[-1], wide, grad, p.tolerance)


@pytest.mark.parametrize("shared", ["act", "grad", "direction"])
@pytest.mark.parametrize("t", [1, 41], ids=["direction", "fused"])
def test_wgrad_dot_into_memory_of_its_inputs(shared: str, t: int) -> None:
    """Several tiles: the first is written while the others are still to be made."""
    p = make(n=3, t=t, d_in=1100, d_out=900, k=1)._asdict()
    size = p[shared].numel()
    memory = torch.zeros(max(size, 1100 * 900) + 5)
    p[shared] = memory[:size].view(p[shared].shape).copy_(p[shared])
    weight_grad = memory[5 : 5 + 1100 * 900].view(900, 1100)
    bias_grad = torch.zeros(900)
    direction, act, grad = (p[name].clone() for name in ("direction", "act", "grad"))
    dots = gk.linear_wgrad_dot_into(
        weight_grad, p["direction"], p["act"], p["grad"], bias_grad=bias_grad
    )
    check_wgrad(weight_grad, dots, direction, act, grad)
    assert_within(bias_grad, grad.double().sum((0, 1)), grad.abs().sum((0, 1)), 1e-6)


@pytest.mark.parametrize("t", [5, 41], ids=["direction", "fused"])
def test_a_backward_that_needs_the_buffer_as_it_was_is_refused(t: int) -> None:
    p = make(t=t)
    buffer, x = torch.ones(17, 13), torch.ones(17, 13, requires_grad=True)
    y = (x * buffer).sum()
    gk.linear_wgrad_dot_into(buffer, p.direction, p.act, p.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


DOTS: dict[str, Callable[[Problem], Tensor]] = {
    "ghost-gram": lambda p: gk.linear_ghost_dot(*p[2:4], *p[:2], method="gram"),
    "ghost-direction": lambda p: gk.linear_ghost_dot(*p[2:4], *p[:2], method="direction"),
    "ghost-pairwise": lambda p: gk.linear_ghost_dot(
        *p[2:4], *p[:2], pairwise=True, method="direction"
    ),
    "direction": lambda p: gk.linear_direction_dot(p.direction, p.act, p.grad),
    "wgrad": lambda p: gk.linear_wgrad_dot(p.direction, p.act, p.grad)[1],
    "joint": lambda p: gk.linear_joint_wgrad_dot(*joint(p), [3])[1][0],
    "norm-ghost": lambda p: gk.norm_ghost_dot(p.val_act, p.val_act, p.act, p.act),
    "norm-wgrad": lambda p: gk.norm_wgrad_dot(p.direction[:, 0], p.act, p.act)[2],
}
OTHERS: dict[str, Callable[[Problem], Tensor]] = {
    "per-token": lambda p: gk.linear_direction_dot(p.direction, p.act, p.grad, per_token=True),
    "wgrad-weight": lambda p: gk.linear_wgrad_dot(p.direction, p.act, p.grad)[0],
    "joint-weight": lambda p: gk.linear_joint_wgrad_dot(*joint(p), [1, 2])[0],
    "norm-weight": lambda p: gk.norm_sample_grads(p.act, p.act)[0],
    "norm-bias": lambda p: gk.norm_sample_grads(p.act, p.act)[1],
}


@pytest.mark.usefixtures("each_count")
@pytest.mark.parametrize("t", [3, 41], ids=["gram-or-direction", "fused"])
@pytest.mark.parametrize("name", ["ghost-gram", "ghost-direction", "direction", "wgrad", "joint"])
def test_outlier_does_not_blur_the_other_dots(name: str, t: int) -> None:
    p = make(t=t, n=7)
    p.grad[2] *= 1e4
    target = reference.linear_sample_grads(p.val_act.double(), p.val_grad.double()).sum(0)
    p = p._replace(direction=target.float()[None].expand(2, -1, -1))
    grads = reference.linear_sample_grads(p.act.double(), p.grad.double())
    bound = target.norm() * grads.flatten(1).norm(dim=1)
    got = torch.atleast_2d(DOTS[name](p))
    want = torch.einsum("oi,noi->n", target, grads).expand_as(got)
    assert_within(got, want, bound, 1e-5)


@pytest.mark.usefixtures("each_count")
@pytest.mark.parametrize("t", [3, 41], ids=["gram-or-direction", "fused"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", (DOTS | OTHERS).values(), ids=DOTS | OTHERS)
def test_result_dtype_repeats_bitwise_also_under_autocast(
    call: Callable[[Problem], Tensor], dtype: str, t: int
) -> None:
    p = make(t=t, dtype=dtype)
    inputs = [x.clone() for x in p]
    first = call(p)
    assert first.dtype == (torch.float64 if dtype == "fp64" else torch.float32)
    assert torch.equal(call(p), first)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(p), first)
    assert all(torch.equal(x, y) for x, y in zip(p, inputs, strict=True))


@pytest.mark.usefixtures("each_count")
@pytest.mark.parametrize("t", [3, 41], ids=["gram-or-direction", "fused"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "fp64"])
@pytest.mark.parametrize("call", (DOTS | OTHERS).values(), ids=DOTS | OTHERS)
def test_inputs_that_require_grad(call: Callable[[Problem], Tensor], dtype: str, t: int) -> None:
    """As activations do that a forward has just made."""
    p = make(t=t, dtype=dtype)
    leaves = Problem(*(x.clone().requires_grad_() for x in p))
    assert torch.equal(call(leaves).detach(), call(p))


@pytest.mark.parametrize("t", [3, 41], ids=["direction", "fused"])
def test_buffers_stay_out_of_graphs(t: int) -> None:
    p = make(t=t)
    leaves = Problem(*(x.clone().requires_grad_() for x in p))
    weight_grad, bias_grad = torch.zeros(17, 13), torch.zeros(17)
    scale = torch.tensor(0.3, requires_grad=True)
    gk.linear_wgrad_dot_into(
        weight_grad, leaves.direction, leaves.act, leaves.grad, bias_grad=bias_grad,
        bias_direction=leaves.direction[:, :, 0], scale=scale, accumulate=True, norms=True,
    )  # fmt: skip
    assert not weight_grad.requires_grad and not bias_grad.requires_grad
    want = 0.3 * p.grad.double().sum((0, 1))
    assert_within(bias_grad, want, p.grad.abs().sum((0, 1)), 1e-6)


def test_opcheck_of_both_routes_and_every_dtype() -> None:
    ops = torch.ops.graddot
    for dtype, t in (("bf16", 3), ("fp16", 41), ("fp64", 3)):
        p = make(t=t, dtype=dtype)
        for op, args in (
            (ops.linear_gram_dot, (*p[2:4], *p[:2], False)),
            (ops.linear_direction_dot, (p.direction, p.act, p.grad, False)),
            (ops.linear_wgrad_dot, (p.direction, p.act, p.grad, None)),
            (ops.linear_joint_wgrad_dot, (*joint(p), [1, 2], None)),
            (ops.linear_wgrad_dot, (p.direction, p.act, p.grad, None, True)),
            (ops.linear_joint_wgrad_dot, (*joint(p), [1, 2], None, True)),
            (ops.norm_sample_grads, (p.act, p.act)),
            (ops.norm_sample_grads, (p.act, p.act, p.act[..., 0].float(), p.act[..., 1].float())),
        ):  # compiled with dynamic shapes in test_compile, where fp32 stands for all
            torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))
