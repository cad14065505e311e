"""The Triton kernels on a GPU against float64: every dtype, the tables' own tiles, their edges."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from kernel_checks import (
    FP32_ERROR,
    TF32_ERROR,
    assert_within,
    check_direction,
    check_gram,
    check_norm,
    check_squares,
    check_wgrad,
    inputs,
    random,
    tf32,
)

import graddot_kernels as gk
from graddot_kernels import fused_head, reference

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
# (N, T, Din, Dout): GPT-2's widths, one over and one under a tile, T = 1, odd widths.
SHAPES = [
    (4, 256, 768, 768),
    (3, 130, 768, 2304),
    (5, 127, 129, 255),
    (2, 65, 1600, 320),
    (9, 17, 64, 50),
    (6, 1, 256, 136),
    (1, 1, 1, 1),
    (1, 1000, 72, 40),
]
SHAPE = pytest.mark.parametrize(
    "shape", SHAPES, ids=["n={}-t={}-din={}-dout={}".format(*s) for s in SHAPES]
)
# Longer sums than in the interpreter, and the matrix units' own accumulation order.
TOLERANCE = 4 * FP32_ERROR


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty is full of NaN, so that an element no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0):  # type: ignore[no-untyped-def]
    n, t, d_in, d_out = shape
    act = random(n, t, d_in, dtype=dtype, device="cuda", seed=seed)
    return act, random(n, t, d_out, dtype=dtype, device="cuda", seed=seed + 1)


@DTYPES
@SHAPE
@pytest.mark.parametrize("pairwise", [False, True], ids=["summed", "pairwise"])
def test_gram(shape: tuple[int, ...], dtype: torch.dtype, pairwise: bool) -> None:
    act, grad = _inputs(shape, dtype)
    val = _inputs((2, max(1, shape[1] - 3), *shape[2:]), dtype, seed=2)
    got = gk.linear_ghost_dot(*val, act, grad, pairwise=pairwise, method="gram")
    check_gram(got, *val, act, grad, pairwise, TOLERANCE)


@DTYPES
@SHAPE
@pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
def test_direction(shape: tuple[int, ...], dtype: torch.dtype, per_token: bool) -> None:
    act, grad = _inputs(shape, dtype)
    direction = random(2, shape[3], shape[2], dtype=dtype, device="cuda")
    got = gk.linear_direction_dot(direction, act, grad, per_token=per_token)
    check_direction(got, direction, act, grad, per_token, TOLERANCE)


# Of ‖D‖ Σ‖b‖‖a‖: an fp32 direction beside bf16 is two of bf16, which keep 16 bits of it.
SPLIT_ERROR = {torch.bfloat16: 2**-15, torch.float16: TOLERANCE}


@pytest.mark.parametrize("dtype", SPLIT_ERROR, ids=["bf16", "fp16"])
@SHAPE
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("k", [1, 3])
def test_fp32_direction_of_16_bit_samples(
    shape: tuple[int, ...], dtype: torch.dtype, magnitude: float, k: int
) -> None:
    act, grad = _inputs(shape, dtype)
    direction = random(k, shape[3], shape[2], dtype=torch.float32, device="cuda") * magnitude
    direction[0] *= 1e-3
    for per_token in (False, True):
        got = gk.linear_direction_dot(direction, act, grad, per_token=per_token)
        check_direction(got, direction, act, grad, per_token, SPLIT_ERROR[dtype])
    dots = gk.linear_wgrad_dot(direction, act, grad)[1]  # by two products where samples are short
    check_direction(dots, direction, act, grad, False, SPLIT_ERROR[dtype])
    direction.zero_()
    assert not gk.linear_direction_dot(direction, act, grad).any()
    direction[0, 0, 0] = torch.inf
    assert not gk.linear_direction_dot(direction, act, grad)[0].isfinite().any()


@pytest.mark.parametrize("dtype", SPLIT_ERROR, ids=["bf16", "fp16"])
@SHAPE
@pytest.mark.parametrize("pairwise", [False, True], ids=["summed", "pairwise"])
def test_ghost_by_direction(shape: tuple[int, ...], dtype: torch.dtype, pairwise: bool) -> None:
    act, grad = _inputs(shape, dtype)
    val = _inputs((2, max(1, shape[1] - 3), *shape[2:]), dtype, seed=2)
    got = gk.linear_ghost_dot(*val, act, grad, pairwise=pairwise, method="direction")
    check_gram(got, *val, act, grad, pairwise, SPLIT_ERROR[dtype])


@DTYPES
@SHAPE
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_wgrad(shape: tuple[int, ...], dtype: torch.dtype, k: int, tma: bool) -> None:
    from graddot_kernels.triton_kernels.launch import choose_tile
    from graddot_kernels.triton_kernels.linear_wgrad import fused_wgrad_dot

    if tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors are Hopper's")
    act, grad = _inputs(shape, dtype)
    direction = random(k, shape[3], shape[2], dtype=dtype, device="cuda")
    scale = torch.tensor(0.5, device="cuda")
    tile = replace(choose_tile("wgrad", act), tma=tma)
    for samples in (None, 1):
        before = random(shape[3], shape[2], dtype=dtype, device="cuda", seed=3)
        out = before.clone()
        dots = fused_wgrad_dot(out, direction, act, grad, scale, True, tile, samples)
        check_wgrad(out, dots, direction, act, grad, scale, before, TOLERANCE)


@DTYPES
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("padded", [False, True], ids=["copied", "padded"])
def test_wgrad_of_an_odd_vocabulary(dtype: torch.dtype, k: int, padded: bool) -> None:
    """Rows that begin at multiples of 16 elements, with NaN between them; or large, and copied."""
    act, grad = _inputs((3, 300, 256, 1201), dtype)
    if padded:
        grad = torch.full((3, 300, 1216), torch.nan, dtype=dtype, device="cuda")[..., :1201].copy_(
            grad
        )
    direction = random(k, 1201, 256, dtype=torch.float32, device="cuda")
    got = gk.linear_wgrad_dot(direction, act, grad)
    check_wgrad(*got, direction, act, grad, tolerance=TOLERANCE)
    squares = gk.linear_wgrad_dot(direction, act, grad, norms=True)[1][-1]
    check_squares(squares, act, grad, TOLERANCE)


@DTYPES
@pytest.mark.parametrize("t", [1, 40, 512])
def test_public_wgrad_and_joint(t: int, dtype: torch.dtype) -> None:
    act, grad = _inputs((6, t, 320, 192), dtype)
    direction = random(2, 192, 320, dtype=dtype, device="cuda")
    scale = torch.tensor(0.5, device="cuda")
    got = gk.linear_wgrad_dot(direction, act, grad, scale=scale)
    check_wgrad(*got, direction, act, grad, scale, tolerance=TOLERANCE)
    squares = gk.linear_wgrad_dot(direction, act, grad, norms=True)[1][-1]
    check_squares(squares, act, grad, TOLERANCE)
    joint = gk.linear_joint_wgrad_dot(act, grad, [1, 2], scale=scale)
    grads = torch.einsum("nto,nti->noi", grad[3:].double(), act[3:].double())
    directions = torch.stack([grads[0], grads[1:].sum(0)])
    check_wgrad(*joint, directions, act[:3], grad[:3], scale, tolerance=2 * TOLERANCE)
    dots = gk.linear_joint_wgrad_dot(act, grad, [1, 2], scale=scale, norms=True)[1]
    check_squares(dots[-1, :-1], act[:3], grad[:3], TOLERANCE)
    squares = directions.square().sum((1, 2))
    assert_within(dots[:-1, -1], squares, squares, TOLERANCE)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1024, 768), (5, 77, 1601), (2, 4096, 64)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype, device="cuda")
    grad = random(*shape, dtype=dtype, device="cuda", seed=1)
    check_norm(gk.norm_sample_grads(x, grad), x, grad)
    mean, rstd = (
        random(*shape[:2], dtype=torch.float32, device="cuda", seed=seed) for seed in (2, 3)
    )
    check_norm(gk.norm_sample_grads(x, grad, mean=mean, rstd=rstd), x, grad, mean, rstd)


def test_tf32_only_when_allowed() -> None:
    act, grad = _inputs((3, 200, 256, 128), torch.float32)
    direction = random(1, 128, 256, dtype=torch.float32, device="cuda")
    for allowed, tolerance in ((False, TOLERANCE), (True, TF32_ERROR)):
        with tf32(allowed):
            got = gk.linear_wgrad_dot(direction, act, grad)
            check_wgrad(*got, direction, act, grad, tolerance=tolerance)
            # Sums, which torch takes in fp32 all the same.
            out, bias = torch.empty_like(direction[0]), act.new_empty(128)
            gk.linear_wgrad_dot_into(out, direction, act, grad, bias_grad=bias)
            size = grad.double().abs().sum((0, 1))
            assert_within(bias, grad.double().sum((0, 1)), size, TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_bitwise_repeatable(dtype: torch.dtype) -> None:
    act, grad = _inputs((7, 300, 768, 640), dtype)
    direction = random(2, 640, 768, dtype=dtype, device="cuda")
    for run in (
        lambda: gk.linear_wgrad_dot(direction, act, grad),
        lambda: (gk.linear_direction_dot(direction, act, grad),),
        lambda: (gk.linear_ghost_dot(act, grad, act, grad, pairwise=True, method="gram"),),
        lambda: gk.norm_sample_grads(act, act),
    ):
        for _ in range(3):
            assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))


def test_gram_memory_is_small() -> None:
    """Nothing of size T × S: 4 × 8 pairs of 2048 tokens would be half a GiB in fp32."""
    act, grad = _inputs((8, 2048, 256, 256), torch.bfloat16)
    torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gk.linear_ghost_dot(act[:4], grad[:4], act, grad, pairwise=True, method="gram")
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


def test_beyond_32_bit_addresses() -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    torch.use_deterministic_algorithms(False)
    n, t, d = 3, 128, 64
    big = [torch.empty(2**31 * (n - 1) + t * d, dtype=torch.bfloat16, device="cuda")
           for _ in range(2)]  # fmt: skip
    act, grad = (x.as_strided((n, t, d), (2**31, d, 1)) for x in big)
    for x, filled in zip((act, grad), inputs(n, t, d, d, dtype=torch.bfloat16), strict=True):
        x.copy_(filled)
    direction = random(1, d, d, dtype=torch.bfloat16, device="cuda")
    check_wgrad(*gk.linear_wgrad_dot(direction, act, grad), direction, act, grad)
    got = gk.linear_ghost_dot(act, grad, act, grad, pairwise=True, method="gram")
    check_gram(got, act, grad, act, grad, True, TOLERANCE)


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    act, grad = (x.to("cuda:1") for x in inputs(3, 40, 64, 64, dtype=torch.bfloat16))
    direction = random(1, 64, 64, dtype=torch.bfloat16, device="cuda:1")
    check_wgrad(*gk.linear_wgrad_dot(direction, act, grad), direction, act, grad)


@DTYPES
@pytest.mark.parametrize("vocab", [1, 50257, 128_256])
@pytest.mark.parametrize("extras", [(0.0, 0.0), (0.1, 1e-3)], ids=["plain", "smoothing-z_loss"])
def test_cross_entropy(dtype: torch.dtype, vocab: int, extras: tuple[float, float]) -> None:
    logits = random(9, vocab, dtype=dtype, device="cuda") * 5
    labels = torch.arange(9, device="cuda") * 7919 % vocab
    labels[4] = -100
    size = logits.double().abs().max()
    want, want_grad = reference.cross_entropy_grad(logits.double(), labels, -100, *extras)
    losses = torch.ops.graddot.cross_entropy_grad(logits, labels, -100, *extras)
    assert ((losses - want).abs() <= 2e-6 * size).all()
    rounding = torch.finfo(dtype).eps * want_grad.abs() + 4e-6
    assert ((logits - want_grad).abs() <= rounding).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_fused_head(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, two targets; against the same op in float64. Logits as large as a head's first
    are: those of a weight as large as act would be rounded by as much as is allowed here."""
    monkeypatch.setitem(fused_head._CHUNK_ELEMENTS, "cuda", 1003 * 100)
    act, weight = (random(*size, 64, dtype=dtype, device="cuda") for size in ((6, 130), (1003,)))
    weight /= 8
    labels = torch.randint(0, 1003, (6, 130), device="cuda")
    labels[1, 5:] = -100
    ids = torch.tensor([1, 5, 999], device="cuda")
    scale = torch.tensor(0.5, device="cuda")
    tail = (labels, [1, 2], None, ids, ids, -100, 0.0, 0.0, scale, True, labels[:3] % 7, True)
    got = torch.ops.graddot.linear_cross_entropy(act, weight, None, *tail)
    want = torch.ops.graddot.linear_cross_entropy(act.double(), weight.double(), None, *tail)
    for g, w in zip(got, want, strict=True):
        if w.numel():
            tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
            assert (g - w).norm() <= tolerance * w.norm()
