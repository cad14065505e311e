"""The linear kernels against float64 in Triton's interpreter: awkward shapes, strides, options.

Its tiles are 16 or 32 wide, so these sizes cross their edges. It miscomputes bf16: see tests/gpu.
"""

import mmap
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    FP32_ERROR,
    assert_within,
    check_direction,
    check_gram,
    check_squares,
    check_wgrad,
    inputs,
    random,
)
from torch import Tensor

from graddot_kernels import triton_kernels
from graddot_kernels.triton_kernels import linear_direction, linear_wgrad
from graddot_kernels.triton_kernels.launch import (
    aligned_rows,
    aligned_width,
    choose_tile,
    fits_descriptor,
    flat_tokens,
)
from graddot_kernels.triton_kernels.linear_direction import linear_direction_dot, split_direction
from graddot_kernels.triton_kernels.linear_gram import linear_gram_dot

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
# (N, T, Din, Dout): single elements, exact tiles, one over, one under, samples that share a tile.
SHAPES = [
    (1, 1, 1, 1),
    (1, 1, 40, 17),
    (5, 1, 7, 5),
    (2, 16, 16, 32),
    (3, 17, 20, 33),
    (2, 33, 31, 15),
    (9, 3, 17, 16),
    (1, 40, 65, 9),
    (4, 7, 3, 50),
    (2, 15, 48, 64),
]
SHAPE = pytest.mark.parametrize(
    "shape", SHAPES, ids=["n={}-t={}-din={}-dout={}".format(*s) for s in SHAPES]
)


def fused(
    direction: Tensor, act: Tensor, grad: Tensor, scale: Tensor | None = None, *,
    out: Tensor | None = None, samples: int | None = None, tma: bool = False, norms: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The fused route whatever the launcher would choose; adds to `out` if given."""
    tile = replace(choose_tile("wgrad", act), tma=tma)
    buffer = act.new_empty((grad.shape[2], act.shape[2]), dtype=torch.float32)
    buffer = buffer if out is None else out
    args = (buffer, direction, act, grad, scale, out is not None, tile, samples, norms)
    return buffer, linear_wgrad.fused_wgrad_dot(*args)


@SHAPE
@pytest.mark.parametrize(
    "pairwise, dtype",
    [(False, torch.float32), (True, torch.float16)],
    ids=["summed-fp32", "pairwise-fp16"],
)
def test_gram(shape: tuple[int, ...], dtype: torch.dtype, pairwise: bool) -> None:
    _, t, d_in, d_out = shape
    act, grad = inputs(*shape, dtype=dtype)
    val_act, val_grad = inputs(3, max(1, t - 2), d_in, d_out, dtype=dtype, seed=2)
    got = linear_gram_dot(val_act, val_grad, act, grad, pairwise)
    check_gram(got, val_act, val_grad, act, grad, pairwise)


@pytest.mark.parametrize("shape", [(3, 16, 48, 16), (1, 40, 16, 24), (20, 1, 16, 16)])
def test_gram_of_all_val_tokens_by_descriptors(shape: tuple[int, ...]) -> None:
    """Flattened into one row, they still are what a descriptor can be made of."""
    _, _, d_in, d_out = shape
    act, grad = inputs(2, 33, d_in, d_out, dtype=torch.float16)
    val = inputs(*shape, dtype=torch.float16, seed=2)
    for x in val:
        flat = flat_tokens(x)
        assert flat is not None and fits_descriptor(flat)
    tile = replace(choose_tile("gram", act), tma=True)
    check_gram(linear_gram_dot(*val, act, grad, False, tile), *val, act, grad, False)


@SHAPE
@pytest.mark.parametrize(
    "per_token, dtype",
    [(False, torch.float16), (True, torch.float32)],
    ids=["sample-fp16", "token-fp32"],
)
def test_direction(shape: tuple[int, ...], dtype: torch.dtype, per_token: bool) -> None:
    act, grad = inputs(*shape, dtype=dtype)
    direction = random(2, shape[3], shape[2], dtype=dtype)
    got = linear_direction_dot(direction, act, grad, per_token)
    check_direction(got, direction, act, grad, per_token)


def test_as_many_directions_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's grid has at most 65535 programs in its second dimension, but 2³¹ in its first."""
    grids = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]):  # type: ignore[no-untyped-def]
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(linear_direction, "direction_kernel", Kernel())
    act, grad = inputs(1, 1, 1, 1, dtype=torch.float32)
    linear_direction_dot(torch.ones(70_000, 1, 1), act, grad, False)
    assert grids == [(70_000,)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_direction_in_two_pieces(dtype: torch.dtype) -> None:
    """Every entry, to the bits that the two hold; in fp16 those below 2⁻³⁸ of the largest go."""
    magnitudes = torch.tensor([1e-45, 1e-38, 1e-6, 1.0, 1e6, 3e38, 0.0])
    mixed = random(1, 33, 24, dtype=torch.float32)
    mixed *= torch.logspace(-12, 0, 24)
    numbers = random(7, 33, 24, dtype=torch.float32).clamp(-1, 1) * magnitudes[:, None, None]
    for direction in (numbers, mixed, numbers.transpose(1, 2)):
        pieces, factor = split_direction(direction, dtype)
        assert pieces.dtype == dtype and pieces.isfinite().all()
        high, low = pieces.double().unflatten(0, (2, -1))
        got = (high + low) * factor.double()[:, None, None]
        error = 2**-16 if dtype == torch.bfloat16 else 2**-22
        floor = 2**-39 * direction.double().abs().amax((1, 2), keepdim=True)
        assert_within(got, direction, direction.double().abs() + floor / error, error)


@pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 1e6, 1e30, 0.0])
@pytest.mark.parametrize("d_in, d_out", [(20, 33), (33, 20)], ids=["tall", "wide"])
def test_fp32_direction_beside_fp16(
    d_in: int, d_out: int, magnitude: float, k: int, per_token: bool
) -> None:
    act, grad = inputs(3, 17, d_in, d_out, dtype=torch.float16)
    direction = random(k, d_out, d_in, dtype=torch.float32) * magnitude
    direction[0] *= 1e-3  # every direction has its own factor
    got = linear_direction_dot(direction, act, grad, per_token)
    check_direction(got, direction, act, grad, per_token)
    if magnitude == 0:
        assert not got.any()


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_fp32_direction_that_is_not_finite(wrong: float) -> None:
    act, grad = inputs(3, 5, 20, 33, dtype=torch.float16)
    direction = random(2, 33, 20, dtype=torch.float32)
    direction[1, 7, 3] = wrong
    got = linear_direction_dot(direction, act, grad, False)
    check_direction(got[:1], direction[:1], act, grad, False)
    assert not got[1].isfinite().any()


@SHAPE
@pytest.mark.parametrize(
    "k, dtype", [(1, torch.float16), (3, torch.float32)], ids=["k=1-fp16", "k=3-fp32"]
)
def test_fused_wgrad(shape: tuple[int, ...], dtype: torch.dtype, k: int) -> None:
    act, grad = inputs(*shape, dtype=dtype)
    direction = random(k, shape[3], shape[2], dtype=dtype)
    check_wgrad(*fused(direction, act, grad), direction, act, grad)


@SHAPE
@pytest.mark.parametrize("k", [1, 3])
def test_fused_wgrad_norms(shape: tuple[int, ...], k: int) -> None:
    act, grad = inputs(*shape, dtype=torch.float16)
    direction = random(k, shape[3], shape[2], dtype=torch.float32)
    weight_grad, dots = fused(direction, act, grad, norms=True, samples=2)
    check_wgrad(weight_grad, dots[:-1], direction, act, grad)
    check_squares(dots[-1], act, grad)


@pytest.mark.parametrize("samples", [1, 2, 5], ids=["split=5", "split=3", "whole"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("k", [1, 2])
def test_fused_wgrad_options(samples: int, out_dtype: torch.dtype, k: int) -> None:
    """Scale, adding to a 16-bit buffer stored the Conv1D way, groups of samples."""
    act, grad = inputs(5, 9, 20, 37, dtype=torch.float16)
    direction = random(k, 37, 20, dtype=torch.float32)
    scale = torch.tensor(0.25, dtype=torch.float32 if k == 1 else torch.float64)  # as an engine's
    before = random(20, 37, dtype=out_dtype, seed=3).t()
    out = before.clone(memory_format=torch.preserve_format)
    got = fused(direction, act, grad, scale, out=out, samples=samples)
    check_wgrad(*got, direction, act, grad, scale, before)


@pytest.mark.parametrize("shape", [(3, 17, 24, 40), (1, 1, 8, 8), (2, 33, 16, 72)])
def test_tensor_descriptors(shape: tuple[int, ...]) -> None:
    _, t, d_in, d_out = shape
    act, grad = inputs(*shape, dtype=torch.float16)
    direction = random(1, d_out, d_in, dtype=torch.float32)
    check_wgrad(*fused(direction, act, grad, tma=True), direction, act, grad)
    val = inputs(2, max(t, 16), d_in, d_out, dtype=torch.float16, seed=2)
    tile = replace(choose_tile("gram", act), tma=True)
    check_gram(linear_gram_dot(*val, act, grad, True, tile), *val, act, grad, True)


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _sliced_batch(x: Tensor) -> Tensor:
    return torch.cat([x, x, x])[1 : 1 + len(x)]


def _sliced_tokens(x: Tensor) -> Tensor:
    return torch.cat([x, x], 1)[:, 3 : 3 + x.shape[1]]


def _wide_rows(x: Tensor) -> Tensor:
    return torch.cat([x, x], 2)[:, :, 1 : 1 + x.shape[2]]


def _time_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize(
    "view", [_transposed, _sliced_batch, _sliced_tokens, _wide_rows, _time_first]
)
def test_strides(view) -> None:  # type: ignore[no-untyped-def]
    act, grad = (view(x) for x in inputs(3, 18, 20, 34, dtype=torch.float32))
    direction = random(2, 20, 34, dtype=torch.float32).transpose(1, 2)  # a Conv1D weight's
    check_wgrad(*fused(direction, act, grad), direction, act, grad)
    check_direction(linear_direction_dot(direction, act, grad, True), direction, act, grad, True)
    got = linear_gram_dot(act[1:], grad[1:], act[:2], grad[:2], False)
    check_gram(got, act[1:], grad[1:], act[:2], grad[:2], False)


@pytest.mark.parametrize("options", ["plain", "norms", "several"])
def test_vocabulary_that_is_no_multiple_of_16(options: str) -> None:
    """Columns behind Dout are loaded where there is memory, and count for nothing."""
    act, _ = inputs(3, 18, 20, 8, dtype=torch.float32)
    whole = torch.full((3, 18, 48), float("nan"))
    grad = whole[:, :, :37].copy_(random(3, 18, 37, dtype=torch.float32))
    assert aligned_width(grad) == 48
    assert (
        aligned_width(torch.empty(54 * 48)[: 53 * 48 + 37].as_strided((1, 54, 37), (0, 48, 1)))
        == 48
    )
    assert aligned_width(torch.empty(53 * 48 + 37).as_strided((1, 54, 37), (0, 48, 1))) == 37
    assert aligned_width(whole[:, :, 16:37]) == 32
    assert aligned_width(whole[:, ::2, :37].contiguous()) == 37
    direction = random(1 + (options == "several"), 37, 20, dtype=torch.float32)
    norms = options == "norms"
    out, dots = fused(direction, act, grad, norms=norms)
    check_wgrad(out, dots[: len(direction)], direction, act, grad)
    if norms:
        check_squares(dots[-1], act, grad)


def test_large_logits_of_an_odd_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Are copied into aligned rows first."""
    act, grad = inputs(3, 18, 20, 37, dtype=torch.float16)
    direction = random(1, 37, 20, dtype=torch.float32)
    assert aligned_rows(grad) is grad
    monkeypatch.setattr("graddot_kernels.triton_kernels.launch._WORTH_A_COPY", 1)
    copy = aligned_rows(grad)
    assert copy.stride() == (18 * 48, 48, 1) and torch.equal(copy, grad)
    assert aligned_rows(copy) is copy
    for other in (grad.transpose(1, 2).contiguous().transpose(1, 2), act[..., :16].contiguous()):
        assert aligned_rows(other) is other
    check_wgrad(*fused(direction, act, grad), direction, act, grad)


def test_broadcast_sample() -> None:
    act = random(1, 9, 20, dtype=torch.float32).expand(4, -1, -1)
    grad = random(4, 9, 17, dtype=torch.float32)
    direction = random(1, 17, 20, dtype=torch.float32)
    check_wgrad(*fused(direction, act, grad, tma=True), direction, act, grad)
    check_gram(linear_gram_dot(act, grad, act, grad, False), act, grad, act, grad, False)


def test_beyond_32_bit_addresses() -> None:
    """Two samples 2³¹ elements apart, in memory of which only their pages are ever touched."""
    t, d, stride = 5, 16, 2**31

    def far(seed: int) -> Tensor:
        memory = mmap.mmap(-1, 2 * (stride + t * d))
        flat = torch.frombuffer(memory, dtype=torch.float16)
        x = flat.as_strided((2, t, d), (stride, d, 1))
        return x.copy_(random(2, t, d, dtype=torch.float16, seed=seed))

    act, grad = far(0), far(1)
    direction = random(1, d, d, dtype=torch.float16)
    check_wgrad(*fused(direction, act, grad), direction, act, grad)
    check_direction(linear_direction_dot(direction, act, grad, True), direction, act, grad, True)
    check_gram(linear_gram_dot(act, grad, act, grad, True), act, grad, act, grad, True)


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("samples", [1, 5])
def test_outlier_leaves_other_dots_alone(place: int, samples: int) -> None:
    """One sample's gradient 10⁴ times the others'. Differences of running sums would be off by
    about 6e-4 of ‖D‖‖G_i‖ here; the bound asked for is 1e-5."""
    act, grad = inputs(5, 19, 24, 33, dtype=torch.float32)
    grad[place] *= 1e4
    direction = random(1, 33, 24, dtype=torch.float32)
    _, dots = fused(direction, act, grad, samples=samples)
    grads = torch.einsum("nto,nti->noi", grad.double(), act.double())
    want = (grads * direction.double()).sum((1, 2))
    scale = direction.double().norm() * grads.flatten(1).norm(dim=1)
    assert (((dots[0].double() - want) / scale).abs() < 1e-5).all()


def test_bitwise_repeatable() -> None:
    act, grad = inputs(5, 19, 24, 33, dtype=torch.float32)
    direction = random(2, 33, 24, dtype=torch.float32)
    for run in (
        lambda: fused(direction, act, grad, samples=2),
        lambda: (linear_direction_dot(direction, act, grad, False),),
        lambda: (linear_gram_dot(act[:1], grad[:1], act[:2], grad[:2], True),),
    ):
        for first, second in zip(run(), run(), strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("zero", [0, 1, 2, 3], ids=["n=0", "t=0", "din=0", "dout=0"])
def test_empty(zero: int) -> None:
    shape = [3, 5, 6, 7]
    shape[zero] = 0
    act, grad = inputs(*shape, dtype=torch.float32)
    val_act, val_grad = inputs(2, 5, *shape[2:], dtype=torch.float32)
    direction = random(2, shape[3], shape[2], dtype=torch.float32)
    scale = torch.tensor(0.5)
    weight_grad, dots = linear_wgrad.linear_wgrad_dot(direction, act, grad, scale)
    check_wgrad(weight_grad, dots, direction, act, grad, scale)
    got = linear_wgrad.linear_wgrad_dot(direction, act, grad, scale, True)[1]
    assert torch.equal(got[:-1], dots) and not got[-1].any()
    check_gram(
        linear_gram_dot(val_act, val_grad, act, grad, True), val_act, val_grad, act, grad, True
    )
    for per_token in (False, True):
        got = linear_direction_dot(direction, act, grad, per_token)
        check_direction(got, direction, act, grad, per_token)
        got = linear_direction_dot(direction, act.half(), grad.half(), per_token)
        check_direction(got, direction, act, grad, per_token)


@DTYPES
@pytest.mark.parametrize("t", [1, 4, 40], ids=["separate", "separate", "fused"])
def test_wgrad_launcher_chooses(t: int, dtype: torch.dtype) -> None:
    """Short samples take a plain weight gradient and the direction route: the result is one."""
    act, grad = inputs(4, t, 20, 33, dtype=dtype)
    direction = random(2, 33, 20, dtype=dtype)
    scale = torch.tensor(0.5)
    for asked in (None, scale):
        got = linear_wgrad.linear_wgrad_dot(direction, act, grad, asked)
        check_wgrad(*got, direction, act, grad, asked)
    got = linear_wgrad.linear_wgrad_dot(direction, act, grad, scale, True)
    check_wgrad(got[0], got[1][:-1], direction, act, grad, scale)
    check_squares(got[1][-1], act, grad)
    wide = direction.float() * 1.001
    check_wgrad(*linear_wgrad.linear_wgrad_dot(wide, act, grad, scale), wide, act, grad, scale)
    before = random(33, 20, dtype=dtype, seed=3)
    out, bias_grads = before.clone(), act.new_empty((4, 33), dtype=torch.float32)
    dots = linear_wgrad.linear_wgrad_dot_into(out, bias_grads, direction, act, grad, scale, True)
    check_wgrad(out, dots, direction, act, grad, scale, before)
    torch.testing.assert_close(bias_grads.double(), grad.double().sum(1), rtol=0, atol=1e-4)


@DTYPES
@pytest.mark.parametrize("t, width", [(2, 48), (24, 20)], ids=["gram", "directions"])
def test_joint(t: int, width: int, dtype: torch.dtype) -> None:
    act, grad = inputs(4 + 3, t, width, width + 5, dtype=dtype)
    scale = torch.tensor(2.0)
    got = linear_wgrad.linear_joint_wgrad_dot(act, grad, [1, 2], scale)
    grads = torch.einsum("nto,nti->noi", grad[4:].double(), act[4:].double())
    direction = torch.stack([grads[:1].sum(0), grads[1:].sum(0)])
    # The directions are themselves rounded to fp32 once more than in the reference.
    check_wgrad(*got, direction, act[:4], grad[:4], scale, tolerance=2e-6)
    weight_grad, dots = linear_wgrad.linear_joint_wgrad_dot(act, grad, [1, 2], scale, True)
    assert torch.equal(weight_grad, got[0]) and torch.equal(dots[:-1, :-1], got[1])
    check_squares(dots[-1, :-1], act[:4], grad[:4])
    squares = direction.square().sum((1, 2))
    assert_within(dots[:-1, -1], squares, squares, FP32_ERROR)
    assert dots[-1, -1] == 0


@pytest.mark.parametrize("t", [3, 40], ids=["separate", "fused"])
def test_scale_of_fp64_leaves_an_op_to_its_kernel(t: int, monkeypatch) -> None:
    """As the fused head has it. Tensors of fp64 go to the plain form."""
    monkeypatch.setattr(triton_kernels, "_too_old", lambda device: False)
    act, grad = inputs(2, t, 20, 17, dtype=torch.float16)
    direction, scale = random(1, 17, 20, dtype=torch.float16), torch.tensor(0.3).double()

    def plain(*args: object) -> None:
        raise NotImplementedError

    run = triton_kernels.gpu_implementation("linear_wgrad", "linear_wgrad_dot", plain)
    check_wgrad(*run(direction, act, grad, scale, False), direction, act, grad, scale)
    with pytest.raises(NotImplementedError):
        run(direction.double(), act.double(), grad.double(), scale, False)


@pytest.mark.parametrize("shared", ["act", "grad"])
@pytest.mark.parametrize("t", [1, 20], ids=["separate", "fused"])
def test_wgrad_into_memory_of_its_inputs(shared: str, t: int) -> None:
    act, grad = inputs(2, t, 70, 50, dtype=torch.float32)
    direction = random(1, 50, 70, dtype=torch.float32)
    memory = torch.zeros(50 * 70 + 2 * t * 70)
    given = {"act": act, "grad": grad}
    source = given[shared]
    given[shared] = memory[: source.numel()].view(source.shape).copy_(source)
    weight_grad, bias_grads = memory[: 50 * 70].view(50, 70), torch.empty(2, 50)
    args = weight_grad, bias_grads, direction, given["act"], given["grad"], None, False
    dots = linear_wgrad.linear_wgrad_dot_into(*args)
    check_wgrad(weight_grad, dots, direction, act, grad)
    assert_within(bias_grads, grad.double().sum(1), grad.abs().sum(1), FP32_ERROR)


SIZE = st.integers(1, 40)


@settings(max_examples=10, deadline=None)
@given(
    n=st.integers(1, 6),
    t=SIZE,
    d_in=SIZE,
    d_out=SIZE,
    k=st.integers(1, 3),
    samples=st.integers(1, 6),
)
def test_wgrad_any_size(n: int, t: int, d_in: int, d_out: int, k: int, samples: int) -> None:
    act, grad = inputs(n, t, d_in, d_out, dtype=torch.float32)
    direction = random(k, d_out, d_in, dtype=torch.float32)
    check_wgrad(*fused(direction, act, grad, samples=samples), direction, act, grad)


@settings(max_examples=10, deadline=None)
@given(v=st.integers(1, 2), s=SIZE, n=st.integers(1, 3), t=SIZE, d=SIZE, pairwise=st.booleans())
def test_gram_any_size(v: int, s: int, n: int, t: int, d: int, pairwise: bool) -> None:
    act, grad = inputs(n, t, d, 17, dtype=torch.float16)
    val_act, val_grad = inputs(v, s, d, 17, dtype=torch.float16, seed=2)
    got = linear_gram_dot(val_act, val_grad, act, grad, pairwise)
    check_gram(got, val_act, val_grad, act, grad, pairwise)
