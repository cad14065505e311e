"""The embedding ops against the float64 reference, and what only compiled code can get wrong."""

import re
from itertools import product

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import graddot_kernels as gk
from graddot_kernels import reference, torch_impl

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ID_LAYOUTS = ["random", "equal", "distinct", "padding", "broadcast", "columns"]
GRAD_LAYOUTS = ["plain", "transposed", "strided", "expanded"]


def make_ids(layout: str, rows: int, cols: int, num_embeddings: int, dtype: torch.dtype) -> Tensor:
    if layout == "equal":
        return torch.full((rows, cols), num_embeddings // 2, dtype=dtype)
    if layout == "padding":
        return torch.zeros(rows, cols, dtype=dtype)  # padding_idx is 0 where there is one
    if layout == "distinct":
        return (torch.randperm(rows * cols) % num_embeddings).view(rows, cols).to(dtype)
    if layout == "broadcast":  # position ids: one row, seen by every sample
        return torch.randint(num_embeddings, (1, cols), dtype=dtype).expand(rows, cols)
    if layout == "columns":
        return torch.randint(num_embeddings, (cols, 2 * rows), dtype=dtype).t()[::2]
    return torch.randint(num_embeddings, (rows, cols), dtype=dtype)


def make_grad(layout: str, rows: int, cols: int, width: int, dtype: torch.dtype) -> Tensor:
    if layout == "transposed":
        return torch.randn(width, cols, rows).to(dtype).permute(2, 1, 0)
    if layout == "strided":
        return torch.randn(cols, 2 * rows, width + 3).to(dtype).transpose(0, 1)[::2, :, :width]
    if layout == "expanded":
        return torch.randn(rows, 1, 1).to(dtype).expand(rows, cols, width)
    return torch.randn(rows, cols, width).to(dtype)


def assert_close(got: Tensor, want: Tensor, terms: Tensor) -> None:
    """|got - want| within the rounding of a sum whose terms' magnitudes add up to `terms`.

    Inputs are compared as they were rounded, so 16-bit ones are as exact as fp32: products and
    additions err by eps each, and a block of a row is summed in at most 128 steps, its results
    and the tokens in fp32 or better.
    """
    eps = torch.finfo(got.dtype).eps
    assert got.dtype == (torch.float64 if got.dtype == torch.float64 else torch.float32)
    assert got.shape == want.shape
    excess = (got.double() - want).abs() - 128 * eps * terms
    if excess.numel() and excess.max() > 0:
        at = tuple(int(i) for i in (excess == excess.max()).nonzero()[0])
        pytest.fail(f"at {at}: got {got[at].item()}, want {want[at].item()}")


@st.composite
def problems(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    n, t, v, s = (draw(st.sampled_from([0, 1, 2, 5])) for _ in range(4))
    width = draw(st.sampled_from([0, 1, 3, 127, 128, 129, 300]))
    e = draw(st.sampled_from([1, 2, 7, 5000]))
    dtype, id_dtype = (
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from([torch.int32, torch.int64])),
    )
    ids = make_ids(draw(st.sampled_from(ID_LAYOUTS)), n, t, e, id_dtype)
    val_ids = make_ids(draw(st.sampled_from(ID_LAYOUTS)), v, s, e, id_dtype)
    grad = make_grad(draw(st.sampled_from(GRAD_LAYOUTS)), n, t, width, dtype)
    val_grad = make_grad(draw(st.sampled_from(GRAD_LAYOUTS)), v, s, width, dtype)
    padding = draw(st.sampled_from([None, 0, e - 1]))
    return ids, grad, val_ids, val_grad, e, padding


@settings(deadline=None, max_examples=150)
@given(problems())
def test_ghost_dot(problem) -> None:
    ids, grad, val_ids, val_grad, e, padding = problem
    got = gk.embedding_ghost_dot(val_ids, val_grad, ids, grad, e, padding_idx=padding)
    val, train = val_grad.double(), grad.double()
    want = reference.embedding_ghost_dot(val_ids, val, ids, train, e, padding)
    terms = reference.embedding_ghost_dot(val_ids, val.abs(), ids, train.abs(), e, padding)
    assert_close(got, want, terms)


@settings(deadline=None, max_examples=150)
@given(problems(), st.sampled_from([1, 3]), st.booleans(), st.booleans())
def test_direction_dot(problem, k: int, per_token: bool, rows_first: bool) -> None:
    ids, grad, _, _, e, padding = problem
    direction = make_grad("plain" if rows_first else "transposed", k, e, grad.shape[2], grad.dtype)
    got = gk.embedding_direction_dot(direction, ids, grad, padding_idx=padding, per_token=per_token)
    args = (ids, padding, per_token)
    want, terms = (
        reference.embedding_direction_dot(d, args[0], g, *args[1:])
        for d, g in (
            (direction.double(), grad.double()),
            (direction.double().abs(), grad.double().abs()),
        )
    )
    assert_close(got, want, terms)


@settings(deadline=None, max_examples=150)
@given(problems(), st.sampled_from([1, 3]), st.sampled_from([None, 0.25]))
def test_wgrad_dot(problem, k: int, factor: float | None) -> None:
    ids, grad, _, _, e, padding = problem
    direction = make_grad("plain", k, e, grad.shape[2], grad.dtype)
    scale = None if factor is None else torch.tensor(factor, dtype=torch.float64)
    got = gk.embedding_wgrad_dot(direction, ids, grad, e, padding_idx=padding, scale=scale)
    d, g = direction.double(), grad.double()
    want = reference.embedding_wgrad_dot(d, ids, g, padding, scale)
    terms = reference.embedding_wgrad_dot(d.abs(), ids, g.abs(), padding, scale)
    for one in zip(got, want, terms, strict=True):
        assert_close(*one)


@settings(deadline=None, max_examples=150)
@given(problems(), st.lists(st.integers(1, 2), min_size=1, max_size=3))
def test_joint_wgrad_dot(problem, val_rows: list[int]) -> None:
    ids, grad, _, _, e, padding = problem
    if sum(val_rows) > ids.shape[0]:
        return
    got = gk.embedding_joint_wgrad_dot(ids, grad, val_rows, e, padding_idx=padding)
    g = grad.double()
    want = reference.embedding_joint_wgrad_dot(ids, g, val_rows, e, padding, None)
    terms = reference.embedding_joint_wgrad_dot(ids, g.abs(), val_rows, e, padding, None)
    for one in zip(got, want, terms, strict=True):
        assert_close(*one)


def test_plain_forms_for_a_gpu_without_the_extension() -> None:
    # They run wherever torch does, so they are compared here, on the CPU.
    torch.manual_seed(0)
    ids, grad, direction = torch.randint(9, (5, 4)), torch.randn(5, 4, 3), torch.randn(2, 9, 3)
    val, train = (ids[3:], grad[3:]), (ids[:3], grad[:3])
    for padding, none in ((2, 2), (-1, None)):
        for name, args in {
            "embedding_ghost_dot": (*val, *train, 9),
            "embedding_direction_dot": (direction, ids, grad),
            "embedding_wgrad_dot": (direction, ids, grad),
            "embedding_joint_wgrad_dot": (ids, grad, [1, 1], 9),
        }.items():
            last = () if "ghost" in name else (True,) if "direction" in name else (None,)
            got = getattr(torch_impl, name)(*args, padding, *last)
            torch.testing.assert_close(got, getattr(reference, name)(*args, none, *last))


def test_ghost_dot_costs_nothing_for_the_tables_size() -> None:
    # A table of this size, or a list of its rows, would not fit any memory.
    e = 2**61
    ids = torch.tensor([[e - 1, 5, 2**40], [2**40 + 1, 2**33, 2**40]])
    val_ids = torch.tensor([[2**40, e - 1, 2**33 + 1]])
    grad, val_grad = torch.randn(2, 3, 4), torch.randn(1, 3, 4)
    got = gk.embedding_ghost_dot(val_ids, val_grad, ids, grad, e)
    want = torch.stack(
        [grad[0, 0] @ val_grad[0, 1] + grad[0, 2] @ val_grad[0, 0], grad[1, 2] @ val_grad[0, 0]]
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number(dtype: torch.dtype) -> None:
    # All finite 16-bit patterns, subnormals included, and the infinities come through exactly.
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = bits[~bits.isnan()]
    ids = torch.zeros(1, 1, dtype=torch.long)
    direction = torch.zeros(1, numbers.numel(), dtype=dtype)
    weight_grad, _ = gk.embedding_wgrad_dot(direction, ids, numbers.view(1, 1, -1), 1)
    assert torch.equal(weight_grad[0], numbers.float())
    nans = bits[bits.isnan()].view(1, 1, -1)
    weight_grad, _ = gk.embedding_wgrad_dot(direction[:, : nans.numel()], ids, nans, 1)
    assert weight_grad.isnan().all()


def large_problem(layout: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    e, n, t, d = 3000, 6, 200, 333
    ids = make_ids(layout, n, t, e, torch.long)
    if layout == "random":  # frequent ids at the front, as text has them
        ids = (ids.double().pow(3) / e**2).long()
    return torch.randn(2, e, d), ids, torch.randn(n, t, d)


@pytest.mark.parametrize("layout", ID_LAYOUTS)
def test_bitwise_the_same_for_any_number_of_threads(layout: str) -> None:
    direction, ids, grad = large_problem(layout)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(
                (
                    *gk.embedding_wgrad_dot(direction, ids, grad, 3000),
                    *gk.embedding_joint_wgrad_dot(ids, grad, [1, 2], 3000),
                    gk.embedding_ghost_dot(ids[4:], grad[4:], ids[:4], grad[:4], 3000),
                    gk.embedding_direction_dot(direction, ids, grad, per_token=True),
                )
            )
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert torch.equal(got, want)


def test_weight_grad_is_summed_in_token_order() -> None:
    # Three rows of one id whose sum in fp32 depends on the order of the additions.
    grad = torch.tensor([1e8, -1e8, 1.0]).view(1, 3, 1).expand(1, 3, 200).contiguous()
    ids = torch.zeros(1, 3, dtype=torch.long)
    weight_grad, _ = gk.embedding_wgrad_dot(torch.zeros(1, 200), ids, grad, 1)
    assert torch.equal(weight_grad, torch.ones(1, 200))
    weight_grad, _ = gk.embedding_wgrad_dot(torch.zeros(1, 200), ids, grad.flip(1), 1)
    assert torch.equal(weight_grad, torch.zeros(1, 200))


@pytest.mark.parametrize("bad", [-1, 5, 2**40])
def test_an_id_outside_the_table_is_named(bad: int) -> None:
    ids, good = torch.tensor([[0, 4], [1, bad]]), torch.tensor([[0, 4], [1, 2]])
    grad, direction = torch.randn(2, 2, 3), torch.randn(5, 3)
    message = re.escape(f"ids[1, 1] is {bad}, outside the table of 5 embeddings")
    calls = {
        message: (
            lambda: gk.embedding_wgrad_dot(direction, ids, grad, 5),
            lambda: gk.embedding_direction_dot(direction, ids, grad),
            lambda: gk.embedding_joint_wgrad_dot(ids, grad, [1], 5),
        ),
        "val_" + message: (lambda: gk.embedding_ghost_dot(ids, grad, good, grad, 5),),
        "train_" + message: (lambda: gk.embedding_ghost_dot(good, grad, ids, grad, 5),),
    }
    for pattern, functions in calls.items():
        for call in functions:
            with pytest.raises(IndexError, match=pattern):
                call()


def test_an_op_called_directly_refuses_what_it_cannot_read() -> None:
    ops = torch.ops.graddot
    ids, grad, direction = torch.zeros(2, 2).long(), torch.randn(2, 2, 3), torch.randn(1, 5, 3)
    bad = [
        (direction, ids.to(torch.int16), grad),
        (direction, ids[:1], grad),
        (direction, ids, grad[0]),
        (direction, ids, grad.double()),
        (direction[..., :2], ids, grad),
        (direction.to(torch.int32), ids, grad.to(torch.int32)),
    ]
    newer = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)  # keeps the words only
    for args in bad:
        with pytest.raises(RuntimeError if newer else ValueError, match="expected"):
            ops.embedding_wgrad_dot(*args, -1, None)
    with pytest.raises(RuntimeError if newer else ValueError, match="val_rows"):
        ops.embedding_joint_wgrad_dot(ids, grad, [3], 5, -1, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    ids = torch.tensor([[0, 3, 3], [4, 0, 1], [1, 2, 0]])
    grad, direction = torch.randn(3, 3, 5).to(dtype), torch.randn(2, 6, 5).to(dtype)
    scale = torch.tensor(0.5)
    ops = torch.ops.graddot
    check = torch.library.opcheck
    check(ops.embedding_ghost_dot.default, (ids[2:], grad[2:], ids[:2], grad[:2], 6, -1))
    for per_token, padding in product([False, True], [-1, 0]):
        check(ops.embedding_direction_dot.default, (direction, ids, grad, padding, per_token))
    for one in (None, scale):
        check(ops.embedding_wgrad_dot.default, (direction, ids, grad, 0, one))
        check(ops.embedding_joint_wgrad_dot.default, (ids, grad, [1, 1], 6, -1, one))


def test_fp16_where_subnormal_numbers_are_flushed():
    """Half numbers below 2^-14 are subnormal in fp16 alone, not in the fp32 that they are read to."""
    half = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    half = half[half.isfinite()].view(-1, 1, 2)
    ids, table = torch.arange(len(half))[:, None], torch.zeros(len(half), 2, dtype=torch.float16)
    assert torch.set_flush_denormal(True) or pytest.skip("this processor does not flush them")
    try:
        read, _ = gk.embedding_wgrad_dot(table, ids, half, len(half))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(read, half[:, 0].float())
