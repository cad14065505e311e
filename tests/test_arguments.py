"""Every public function's refusals: the argument at fault, what it is, and what was expected."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import graddot_kernels as gk


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


HALF, INT = torch.float16, torch.int64
ACT, GRAD, DIRECTION = x(2, 4, 3), x(2, 4, 5), x(5, 3)
IDS, ROWS, TABLE = x(2, 4, dtype=INT), x(2, 4, 3), x(7, 3)
COUNTS = "positive row counts, one a target, at most 2 in all"
FLOAT = "expected one of (torch.float32"

# Case -> (a call, the beginning of its message, the expectation in it).
LINEAR: dict[str, tuple[Callable[[], object], str, str]] = {
    "buffer-shape": (
        lambda: gk.linear_wgrad_dot_into(x(3, 5), DIRECTION, ACT, GRAD),
        "weight_grad has shape (3, 5)",
        "(5, 3)",
    ),
    "buffer-dtype": (
        lambda: gk.linear_wgrad_dot_into(x(5, 3, dtype=INT), DIRECTION, ACT, GRAD),
        "weight_grad has dtype torch.int64",
        FLOAT,
    ),
    "bias-buffer": (
        lambda: gk.linear_wgrad_dot_into(x(5, 3), DIRECTION, ACT, GRAD, bias_grad=x(3)),
        "bias_grad has shape (3,)",
        "(5,)",
    ),
    "bias-direction": (
        lambda: gk.linear_wgrad_dot_into(x(5, 3), DIRECTION, ACT, GRAD, bias_direction=x(1, 5)),
        "bias_direction has shape (1, 5)",
        "(5,)",
    ),
    "act-1d": (
        lambda: gk.linear_wgrad_dot(DIRECTION, x(3), GRAD),
        "act has shape (3,)",
        "(N, T, D), or (N, D) for T = 1",
    ),
    "act-4d": (
        lambda: gk.linear_direction_dot(DIRECTION, x(1, 2, 4, 3), GRAD),
        "act has shape (1, 2, 4, 3)",
        "(N, T, D)",
    ),
    "grad-tokens": (
        lambda: gk.linear_direction_dot(DIRECTION, ACT, x(2, 3, 5)),
        "grad has shape (2, 3, 5)",
        "(2, 4, Dout), as act",
    ),
    "grad-2d": (
        lambda: gk.linear_joint_wgrad_dot(ACT, x(2, 5), [1]),
        "grad has shape (2, 5)",
        "(2, 4, Dout), as act",
    ),
    "act-2d": (
        lambda: gk.linear_wgrad_dot(DIRECTION, x(2, 3), GRAD),
        "grad has shape (2, 4, 5)",
        "(2, Dout), as act",
    ),
    "val-grad-rows": (
        lambda: gk.linear_ghost_dot(ACT, x(1, 4, 5), ACT, GRAD),
        "val_grad has shape (1, 4, 5)",
        "(2, 4, Dout), as val_act",
    ),
    "train-act-width": (
        lambda: gk.linear_ghost_dot(ACT, GRAD, x(2, 4, 6), GRAD),
        "train_act has shape (2, 4, 6)",
        "(N, T, 3), val_act's width",
    ),
    "train-grad-width": (
        lambda: gk.linear_ghost_dot(ACT, GRAD, ACT, x(2, 4, 6)),
        "train_grad has shape (2, 4, 6)",
        "(N, T, 5), val_grad's width",
    ),
    "direction-transposed": (
        lambda: gk.linear_wgrad_dot(x(3, 5), ACT, GRAD),
        "direction has shape (3, 5)",
        "([K,] 5, 3)",
    ),
    "direction-1d": (
        lambda: gk.linear_direction_dot(x(3), ACT, GRAD),
        "direction has shape (3,)",
        "([K,] 5, 3)",
    ),
    "direction-k=0": (
        lambda: gk.linear_wgrad_dot(x(0, 5, 3), ACT, GRAD),
        "direction has shape (0, 5, 3)",
        "at least one direction",
    ),
    "mixed-dtypes": (
        lambda: gk.linear_direction_dot(DIRECTION, ACT, GRAD.half()),
        "grad has dtype torch.float16",
        "act's, torch.float32",
    ),
    "direction-too-wide": (
        lambda: gk.linear_wgrad_dot(DIRECTION.double(), ACT.half(), GRAD.half()),
        "direction has dtype torch.float64",
        "act's, torch.float16",
    ),
    "integer": (
        lambda: gk.linear_joint_wgrad_dot(ACT.long(), GRAD.long(), [1]),
        "act has dtype torch.int64",
        FLOAT,
    ),
    "device": (
        lambda: gk.linear_direction_dot(DIRECTION, ACT, GRAD.to("meta")),
        "grad is on meta",
        "act's, cpu",
    ),
    "method": (
        lambda: gk.linear_ghost_dot(ACT, GRAD, ACT, GRAD, method="fast"),  # type: ignore[arg-type]
        "method has 'fast'",
        "auto, gram or direction",
    ),
    "val-rows-empty": (
        lambda: gk.linear_joint_wgrad_dot(ACT, GRAD, []),
        "val_rows has []",
        COUNTS,
    ),
    "val-rows-zero": (
        lambda: gk.linear_joint_wgrad_dot(ACT, GRAD, [1, 0]),
        "val_rows has [1, 0]",
        COUNTS,
    ),
    "val-rows-too-many": (
        lambda: gk.embedding_joint_wgrad_dot(IDS, ROWS, [2, 1], 7),
        "val_rows has [2, 1]",
        COUNTS,
    ),
    "scale-1d": (
        lambda: gk.linear_wgrad_dot(DIRECTION, ACT, GRAD, scale=x(3)),
        "scale has shape (3,)",
        "a 0-dim tensor",
    ),
    "scale-number": (
        lambda: gk.embedding_joint_wgrad_dot(IDS, ROWS, [1], 7, scale=0.5),  # type: ignore[arg-type]
        "scale has 0.5",
        "a 0-dim tensor",
    ),
    "scale-complex": (
        lambda: gk.linear_wgrad_dot(DIRECTION, ACT, GRAD, scale=torch.tensor(1j)),
        "scale has dtype torch.complex64",
        "a real one",
    ),
    "scale-on-meta": (
        lambda: gk.linear_joint_wgrad_dot(ACT, GRAD, [1], scale=x().to("meta")),
        "scale is on meta",
        "the CPU",
    ),
    "sparse": (
        lambda: gk.linear_wgrad_dot(DIRECTION.to_sparse(), ACT, GRAD),
        "direction is of layout torch.sparse_coo",
        "a dense tensor",
    ),
    "nested": (
        lambda: gk.linear_direction_dot(DIRECTION, torch.nested.nested_tensor(list(ACT)), GRAD),
        "act is a nested tensor",
        "a dense tensor",
    ),
    "buffer-expanded": (
        lambda: gk.linear_wgrad_dot_into(x(1, 3).expand(5, 3), DIRECTION, ACT, GRAD),
        "weight_grad has strides (0, 1), several elements in one place",
        "clone()",
    ),
}
NORM: dict[str, tuple[Callable[[], object], str, str]] = {
    "mean-shape": (
        lambda: gk.norm_sample_grads(ACT, ACT, mean=x(2, 3)),
        "mean has shape (2, 3)",
        "(2, 4), a token one",
    ),
    "rstd-dtype": (
        lambda: gk.norm_sample_grads(ACT, ACT, rstd=x(2, 4, dtype=HALF)),
        "rstd has dtype torch.float16 on cpu",
        "torch.float32 on cpu",
    ),
    "normed-1d": (lambda: gk.norm_sample_grads(x(3), x(3)), "normed has shape (3,)", "(N, T, D)"),
    "width": (
        lambda: gk.norm_sample_grads(ACT, GRAD),
        "grad has shape (2, 4, 5)",
        "(2, 4, 3), normed's shape",
    ),
    "val-grad-tokens": (
        lambda: gk.norm_ghost_dot(ACT, x(2, 3, 3), ACT, ACT),
        "val_grad has shape (2, 3, 3)",
        "(2, 4, Dout), as val_normed",
    ),
    "train-width": (
        lambda: gk.norm_ghost_dot(ACT, ACT, GRAD, GRAD),
        "train_normed has shape (2, 4, 5)",
        "(N, T, 3), val_normed's width",
    ),
    "mixed-dtypes": (
        lambda: gk.norm_ghost_dot(ACT, ACT, ACT.half(), ACT.half()),
        "train_normed has dtype torch.float16",
        "val_normed's, torch.float32",
    ),
    "direction-width": (
        lambda: gk.norm_wgrad_dot(x(4), ACT, ACT),
        "direction has shape (4,)",
        "([K,] 3)",
    ),
    "direction-k=0": (
        lambda: gk.norm_wgrad_dot(x(0, 3), ACT, ACT),
        "direction has shape (0, 3)",
        "K at least 1",
    ),
    "direction-dtype": (
        lambda: gk.norm_wgrad_dot(x(3, dtype=INT), ACT, ACT),
        "direction has dtype torch.int64",
        FLOAT,
    ),
    "bias-direction": (
        lambda: gk.norm_wgrad_dot(x(3), ACT, ACT, bias_direction=x(2, 3)),
        "bias_direction has shape (2, 3)",
        "(3,), direction's shape",
    ),
    "bias-direction-dtype": (
        lambda: gk.norm_wgrad_dot(x(3), ACT, ACT, bias_direction=x(3, dtype=HALF)),
        "bias_direction has dtype torch.float16",
        "direction's, torch.float32",
    ),
}
EMBEDDING: dict[str, tuple[Callable[[], object], str, str]] = {
    "ids-dtype": (
        lambda: gk.embedding_ghost_dot(IDS, ROWS, IDS.float(), ROWS, 7),
        "train_ids has dtype torch.float32",
        "int32 or int64",
    ),
    "ids-3d": (
        lambda: gk.embedding_direction_dot(TABLE, x(2, 4, 1, dtype=INT), ROWS),
        "ids has shape (2, 4, 1)",
        "(N, T), or (N,) for T = 1",
    ),
    "grad-rows": (
        lambda: gk.embedding_ghost_dot(IDS, x(1, 4, 3), IDS, ROWS, 7),
        "val_grad has shape (1, 4, 3)",
        "(2, 4, d), as val_ids",
    ),
    "train-grad-width": (
        lambda: gk.embedding_ghost_dot(IDS, ROWS, IDS, GRAD, 7),
        "train_grad has shape (2, 4, 5)",
        "(N, T, 3), val_grad's width",
    ),
    "direction-rows": (
        lambda: gk.embedding_wgrad_dot(TABLE, IDS, ROWS, 8),
        "direction has shape (7, 3)",
        "([K,] 8, 3)",
    ),
    "direction-width": (
        lambda: gk.embedding_direction_dot(x(7, 2), IDS, ROWS),
        "direction has shape (7, 2)",
        "([K,] num_embeddings, 3)",
    ),
    "padding-above": (
        lambda: gk.embedding_wgrad_dot(TABLE, IDS, ROWS, 7, padding_idx=7),
        "padding_idx has 7",
        "an index into 7 embeddings",
    ),
    "padding-below": (
        lambda: gk.embedding_joint_wgrad_dot(IDS, ROWS, [1], 7, padding_idx=-8),
        "padding_idx has -8",
        "an index into 7 embeddings",
    ),
    "no-table": (
        lambda: gk.embedding_joint_wgrad_dot(IDS[:, :0], ROWS[:, :0], [1], -7),
        "num_embeddings is -7",
        "the rows of a table",
    ),
    "grad-integer": (
        lambda: gk.embedding_joint_wgrad_dot(IDS, ROWS.int(), [1], 7),
        "grad has dtype torch.int32",
        FLOAT,
    ),
}
CASES = {
    f"{family}-{name}": case
    for family, cases in (("linear", LINEAR), ("norm", NORM), ("embedding", EMBEDDING))
    for name, case in cases.items()
}


@pytest.mark.parametrize(("call", "fault", "expected"), CASES.values(), ids=CASES)
def test_refusal_names(call: Callable[[], object], fault: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(fault)}; .*{re.escape(expected)}"):
        call()


NO_TENSORS: dict[str, Callable[[], object]] = {
    "act must be a tensor, got ndarray": lambda: gk.linear_direction_dot(
        DIRECTION,
        ACT.numpy(),  # type: ignore[arg-type]
        GRAD,
    ),
    "val_ids must be a tensor, got list": lambda: gk.embedding_ghost_dot(
        [[0]],  # type: ignore[arg-type]
        ROWS,
        IDS,
        ROWS,
        7,
    ),
    "rstd must be a tensor, got float": lambda: gk.norm_sample_grads(
        ACT,
        ACT,
        rstd=1.0,  # type: ignore[arg-type]
    ),
    "num_embeddings must be a whole number, got a Tensor": lambda: gk.embedding_ghost_dot(
        IDS,
        ROWS,
        IDS,
        ROWS,
        TABLE,  # type: ignore[arg-type]
    ),
    "padding_idx must be a whole number, got 1.5": lambda: gk.embedding_direction_dot(
        TABLE,
        IDS,
        ROWS,
        padding_idx=1.5,  # type: ignore[arg-type]
    ),
    r"val_rows\[1\] must be a whole number, got '1'": lambda: gk.linear_joint_wgrad_dot(
        ACT,
        GRAD,
        [1, "1"],  # type: ignore[list-item]
    ),
    "val_rows must be a list of numbers, got int": lambda: gk.linear_joint_wgrad_dot(
        ACT,
        GRAD,
        1,  # type: ignore[arg-type]
    ),
}


@pytest.mark.parametrize("message", NO_TENSORS)
def test_refusal_of_another_type(message: str) -> None:
    with pytest.raises(TypeError, match=message):
        NO_TENSORS[message]()


OPS = torch.ops.graddot
DIRECT: dict[str, Callable[[], object]] = {
    "tokens": lambda: OPS.linear_wgrad_dot(x(1, 5, 3), x(2, 40, 3), x(2, 30, 5), None),
    "direction": lambda: OPS.linear_wgrad_dot(x(1, 5, 2), x(2, 40, 3), x(2, 40, 5), None),
    "dtype": lambda: OPS.linear_wgrad_dot(x(1, 5, 3), x(2, 40, 3), x(2, 40, 5).double(), None),
    "buffer": lambda: OPS.linear_wgrad_dot_into(
        x(5, 2), None, x(50, 5, 3), x(2, 40, 3), x(2, 40, 5), None, False
    ),
    "val-rows": lambda: OPS.linear_joint_wgrad_dot(x(2, 40, 3), x(2, 40, 5), [1, 0], None),
    "val-rows-negative": lambda: OPS.linear_joint_wgrad_dot(
        x(2, 40, 3), x(2, 40, 5), [2, -1], None
    ),
}


@pytest.mark.parametrize("call", DIRECT.values(), ids=DIRECT)
def test_an_op_called_directly_refuses_what_it_cannot_read(call: Callable[[], object]) -> None:
    with pytest.raises((ValueError, RuntimeError)):  # the plain forms leave it to torch
        call()


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "fp16"])
def test_shapes_on_the_meta_device(dtype: torch.dtype) -> None:
    act, grad, direction = (x.to("meta", dtype) for x in (ACT, GRAD, DIRECTION))
    ghost = gk.linear_ghost_dot(act, grad, act, grad, method="direction")
    into = gk.linear_wgrad_dot_into(
        direction, direction, act, grad, bias_grad=grad[0, 0], norms=True
    )
    norm = gk.norm_wgrad_dot(direction, act, act, bias_direction=direction)
    got = ghost, into, gk.norm_ghost_dot(act, act, act, act), *norm
    assert [tuple(y.shape) for y in got] == [(2,), (2, 2), (2,), (3,), (3,), (5, 2)]
    assert all(y.is_meta for y in got)
