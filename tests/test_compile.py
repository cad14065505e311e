"""torch.compile(fullgraph=True) of a function calling each public op gives the eager result."""

from collections.abc import Callable

import pytest
import torch
from checked_backend import checked
from torch import Tensor

import graddot_kernels as gk

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _linear(device: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    act, grad = torch.randn(5, 7, 12), torch.randn(5, 7, 9)
    return act.to(device), grad.to(device), torch.randn(2, 9, 12).to(device)


def _embedding(device: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    ids, grad = torch.randint(0, 11, (5, 7)), torch.randn(5, 7, 6)
    return ids.to(device), grad.to(device), torch.randn(2, 11, 6).to(device)


def _into(d: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    weight_grad, bias_grads = a.new_ones(b.shape[2], a.shape[2]), a.new_empty(b.shape[::2])
    dots = torch.ops.graddot.linear_wgrad_dot_into(weight_grad, bias_grads, d, a, b, None, True)
    return weight_grad, bias_grads, dots


LINEAR: dict[str, Callable[..., object]] = {
    "gram": lambda a, b, d: gk.linear_ghost_dot(a[3:], b[3:], a[:3], b[:3], method="gram"),
    "pairwise": lambda a, b, d: gk.linear_ghost_dot(a[3:], b[3:], a[:3], b[:3], pairwise=True),
    "direction": lambda a, b, d: gk.linear_direction_dot(d, a, b, per_token=True),
    "wgrad": lambda a, b, d: gk.linear_wgrad_dot(d, a, b, scale=a.sum()),
    "wgrad into": lambda a, b, d: _into(d, a, b),
    "joint": lambda a, b, d: gk.linear_joint_wgrad_dot(a, b, [1, 1]),
    "wgrad norms": lambda a, b, d: gk.linear_wgrad_dot(d, a, b, norms=True),
    "joint norms": lambda a, b, d: gk.linear_joint_wgrad_dot(a, b, [1, 1], norms=True),
    "norm": lambda a, b, d: gk.norm_sample_grads(a, a * 2),
    "norm ghost": lambda a, b, d: gk.norm_ghost_dot(a[3:], a[3:], a[:3], a[:3]),
    "norm wgrad": lambda a, b, d: gk.norm_wgrad_dot(d[:, 0], a, a, bias_direction=d[:, 1]),
}
EMBEDDING: dict[str, Callable[..., object]] = {
    "ghost": lambda i, g, d: gk.embedding_ghost_dot(i[3:], g[3:], i[:3], g[:3], 11),
    "direction": lambda i, g, d: gk.embedding_direction_dot(d, i, g, padding_idx=0),
    "wgrad": lambda i, g, d: gk.embedding_wgrad_dot(d, i, g, 11),
    "joint": lambda i, g, d: gk.embedding_joint_wgrad_dot(i, g, [2], 11),
}


def _check(function: Callable[..., object], args: tuple[Tensor, ...]) -> None:
    # The graph alone is in question, not the code an inductor makes around the op.
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: function(*x), fullgraph=True, backend=checked)
    torch.testing.assert_close(compiled(*args), function(*args))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LINEAR)
def test_linear_and_norm(name: str, device: str) -> None:
    _check(LINEAR[name], _linear(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", EMBEDDING)
def test_embedding(name: str, device: str) -> None:
    _check(EMBEDDING[name], _embedding(device))


CALLS = {f"linear {name}": (call, _linear) for name, call in LINEAR.items()}
CALLS |= {f"embedding {name}": (call, _embedding) for name, call in EMBEDDING.items()}


@pytest.mark.parametrize(("call", "make"), CALLS.values(), ids=CALLS)
def test_one_graph_for_all_numbers_of_rows_and_tokens(call, make) -> None:  # type: ignore[no-untyped-def]
    inputs = make("cpu")
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: call(*x), fullgraph=True, backend=checked, dynamic=True)
    compiled(*inputs)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows, tokens in ((6, 5), (9, 41)):
            more = [x.repeat(2, 6, *[1] * (x.dim() - 2))[:rows, :tokens] for x in inputs[:2]]
            args = *(x.contiguous() for x in more), inputs[2]
            torch.testing.assert_close(compiled(*args), call(*args))


@pytest.mark.parametrize("device", DEVICES)
def test_inductor(device: str) -> None:
    """One function through the default backend, with arithmetic around the op to fuse."""
    act, grad, direction = _linear(device)

    def function(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
        weight_grad, dots = gk.linear_wgrad_dot(d.sin(), a * 2, b)
        return dots.sin() + weight_grad.relu().mean()

    got = torch.compile(function, fullgraph=True)(act, grad, direction)
    torch.testing.assert_close(got, function(act, grad, direction))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    act, grad, direction = _linear(device)
    ops = torch.ops.graddot
    weight_grad, bias_grads = act.new_ones(9, 12), act.new_empty(5, 9)
    scale = act.new_tensor(0.5)
    labels = torch.randint(0, 9, act.shape[:2], device=device)
    for op, args in (
        (ops.linear_gram_dot, (act[3:], grad[3:], act[:3], grad[:3], True)),
        (ops.linear_direction_dot, (direction, act, grad, True)),
        (ops.linear_wgrad_dot, (direction, act, grad, scale)),
        (ops.linear_wgrad_dot_into, (weight_grad, bias_grads, direction, act, grad, scale, True)),
        (ops.linear_joint_wgrad_dot, (act, grad, [1, 2], scale)),
        (ops.linear_wgrad_dot, (direction, act, grad, scale, True)),
        (ops.linear_joint_wgrad_dot, (act, grad, [1, 2], scale, True)),
        (ops.norm_sample_grads, (act, act)),
        (ops.cross_entropy_grad, (act[0].clone(), labels[0], -100, 0.1, 1e-3)),
        (
            ops.linear_cross_entropy,
            (
                act,
                act.new_ones(9, 12),
                act.new_ones(9),
                labels,
                [1, 2],
                None,
                labels[0, :2],
                labels[1, :1],
                -100,
                0.1,
                1e-3,
                scale,
                True,
                labels[:2],
                True,
            ),
        ),
    ):
        torch.library.opcheck(op.default, args)
