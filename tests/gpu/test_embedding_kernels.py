"""The CUDA embedding kernels on a GPU against float64 on a CPU: the layouts of tests/test_embedding.py,
segments of equal ids that one warp takes and that a thread block shares."""

from itertools import product

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from test_embedding import (
    DTYPES,
    GRAD_LAYOUTS,
    ID_LAYOUTS,
    assert_close,
    make_grad,
    make_ids,
    problems,
)
from torch import Tensor

import graddot_kernels as gk
from graddot_kernels import _extension, reference

DEVICE = "cuda"
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
NAMES |= {torch.float64: "fp64", torch.int32: "int32", torch.int64: "int64"}
E = 70
Problem = tuple[Tensor, Tensor, Tensor, Tensor, int, int | None]  # as `problems` draws them


def moved(x: Tensor) -> Tensor:
    """x on the device with its strides, which `to` would not keep of views with gaps or overlaps."""
    size = x.untyped_storage().nbytes() // x.itemsize
    memory = x.as_strided((size,), (1,), 0).to(DEVICE)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def magnitude(x: Tensor) -> Tensor:
    return x.double().abs()


def check_all(got: tuple[Tensor, ...], want: tuple[Tensor, ...], terms: tuple[Tensor, ...]) -> None:
    for one, exact, size in zip(got, want, terms, strict=True):
        assert one.device.type == DEVICE
        # In fp64 the reference rounds as well, in longer sums: whole tables, not a sample's tokens.
        assert_close(one.cpu(), exact, size * (8 if one.dtype == torch.float64 else 1))


def check_ghost(problem: Problem) -> None:
    ids, grad, val_ids, val_grad, e, padding = problem
    rows = (moved(x) for x in (val_ids, val_grad, ids, grad))
    got = gk.embedding_ghost_dot(*rows, e, padding_idx=padding)
    want, terms = (
        reference.embedding_ghost_dot(val_ids, f(val_grad), ids, f(grad), e, padding)
        for f in (Tensor.double, magnitude)
    )
    check_all((got,), (want,), (terms,))


def check_direction(problem: Problem, k: int, rows_first: bool = True) -> None:
    ids, grad, _, _, e, padding = problem
    direction = make_grad("plain" if rows_first else "transposed", k, e, grad.shape[2], grad.dtype)
    for per_token in (False, True):
        got = gk.embedding_direction_dot(
            moved(direction), moved(ids), moved(grad), padding_idx=padding, per_token=per_token
        )
        want, terms = (
            reference.embedding_direction_dot(f(direction), ids, f(grad), padding, per_token)
            for f in (Tensor.double, magnitude)
        )
        check_all((got,), (want,), (terms,))


def check_wgrad(problem: Problem, k: int, factor: float | None) -> None:
    ids, grad, _, _, e, padding = problem
    direction = make_grad("plain", k, e, grad.shape[2], grad.dtype)
    scale = None if factor is None else torch.tensor(factor, dtype=torch.float64)
    args = moved(direction), moved(ids), moved(grad), e
    got = gk.embedding_wgrad_dot(*args, padding_idx=padding, scale=scale)
    want, terms = (
        reference.embedding_wgrad_dot(f(direction), ids, f(grad), padding, scale)
        for f in (Tensor.double, magnitude)
    )
    check_all(got, want, terms)


def check_joint(problem: Problem, val_rows: list[int], factor: float | None) -> None:
    ids, grad, _, _, e, padding = problem
    scale = None if factor is None else torch.tensor(factor, dtype=torch.float64)
    got = gk.embedding_joint_wgrad_dot(
        moved(ids), moved(grad), val_rows, e, padding_idx=padding, scale=scale
    )
    want, terms = (
        reference.embedding_joint_wgrad_dot(ids, f(grad), val_rows, e, padding, scale)
        for f in (Tensor.double, magnitude)
    )
    check_all(got, want, terms)


def make(layout: str, grad_layout: str, dtype: torch.dtype, id_dtype: torch.dtype) -> Problem:
    """200 tokens of 131 columns: equal ids are one segment of more than 32 tokens."""
    torch.manual_seed(0)
    ids, val_ids = (make_ids(layout, n, 40, E, id_dtype) for n in (5, 2))
    grad, val_grad = (make_grad(grad_layout, n, 40, 131, dtype) for n in (5, 2))
    return ids, grad, val_ids, val_grad, E, 0


LAYOUTS = list(product(ID_LAYOUTS, GRAD_LAYOUTS, DTYPES))


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=NAMES.get)
@pytest.mark.parametrize(
    "layout, grad_layout, dtype", LAYOUTS, ids=[f"{a}-{b}-{NAMES[c]}" for a, b, c in LAYOUTS]
)
def test_layouts(layout: str, grad_layout: str, dtype: torch.dtype, id_dtype: torch.dtype) -> None:
    problem = make(layout, grad_layout, dtype, id_dtype)
    check_ghost(problem)
    for k in (1, 3):
        check_direction(problem, k)
        check_wgrad(problem, k, 0.25)
    for val_rows in ([1], [1, 2]):
        check_joint(problem, val_rows, 0.25)
        check_joint((*problem[:5], None), val_rows, None)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(problems(), st.sampled_from([1, 3]), st.booleans(), st.sampled_from([None, 0.25]))
def test_drawn_problems(problem, k: int, rows_first: bool, factor: float | None) -> None:
    """No rows, tokens or columns, and tables of one row, among them."""
    check_ghost(problem)
    check_direction(problem, k, rows_first)
    check_wgrad(problem, k, factor)
    for val_rows in ([1], [2, 1]):
        if sum(val_rows) <= problem[0].shape[0]:
            check_joint(problem, val_rows, factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_text(dtype: torch.dtype) -> None:
    """Frequent ids at the front, as text has them, and a table of a tokenizer's size."""
    torch.manual_seed(0)
    e = 50257
    ids = (torch.randint(e, (10, 512)).double().pow(3) / e**2).long()
    grad = torch.randn(10, 512, 40).to(dtype)
    problem = ids[:6], grad[:6], ids[6:], grad[6:], e, None
    check_ghost(problem)
    check_direction(problem, 3)
    check_wgrad(problem, 1, None)
    check_joint(problem, [1, 2], None)


def compiled() -> None:
    if not _extension.HAS_CUDA:
        pytest.skip("the package was built without CUDA kernels: these tests ran the plain forms")


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("layout", ID_LAYOUTS)
def test_bitwise_repeatable(layout: str, dtype: torch.dtype) -> None:
    compiled()
    ids, grad, val_ids, val_grad, e, padding = (
        moved(x) if isinstance(x, Tensor) else x
        for x in make(layout, "plain", dtype, torch.int64)
    )  # fmt: skip
    direction = moved(torch.randn(3, e, 131).to(dtype))

    def run() -> tuple[Tensor, ...]:
        return (
            gk.embedding_ghost_dot(val_ids, val_grad, ids, grad, e, padding_idx=padding),
            gk.embedding_direction_dot(direction, ids, grad, per_token=True),
            *gk.embedding_wgrad_dot(direction, ids, grad, e),
            *gk.embedding_joint_wgrad_dot(ids, grad, [1, 2], e),
        )

    first = run()
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(first, run(), strict=True))


def test_ids_of_a_table_without_rows() -> None:
    """Refused on the host: after a trap on the device the process could not use it any more."""
    compiled()
    ids, grad = torch.zeros(2, 3, dtype=torch.long, device=DEVICE), torch.ones(2, 3, 4).to(DEVICE)
    direction = grad.new_empty(1, 0, 4)
    for call in (
        lambda: gk.embedding_direction_dot(direction, ids, grad),
        lambda: gk.embedding_wgrad_dot(direction, ids, grad, 0),
        lambda: gk.embedding_joint_wgrad_dot(ids, grad, [1], 0),
        lambda: gk.embedding_ghost_dot(ids, grad, ids, grad, 0),
    ):
        with pytest.raises(IndexError, match="outside the table of 0 embeddings"):
            call()
    none = ids[:, :0], grad[:, :0]
    assert not gk.embedding_direction_dot(direction, *none).any()
