"""The norm kernel against float64 in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import check_norm, random

from graddot_kernels.triton_kernels.norm import norm_sample_grads

SHAPES = [(1, 1, 1), (1, 1, 33), (3, 8, 16), (2, 9, 17), (5, 70, 40), (0, 3, 4), (2, 0, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=["n={}-t={}-d={}".format(*s) for s in SHAPES])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    check_norm(norm_sample_grads(x, grad), x, grad)
    mean, rstd = (random(*shape[:2], dtype=torch.float32, seed=seed) for seed in (2, 3))
    for statistics in ((mean, rstd), (None, rstd), (mean.t().contiguous().t(), None)):
        check_norm(norm_sample_grads(x, grad, *statistics), x, grad, *statistics)


def test_strides_and_repeat() -> None:
    normed = random(20, 4, 48, dtype=torch.float32)[:, 1:, ::2].transpose(0, 1)
    grad = random(5, 20, 24, dtype=torch.float32, seed=1)[2:]
    got = norm_sample_grads(normed, grad)
    check_norm(got, normed, grad)
    for first, second in zip(got, norm_sample_grads(normed, grad), strict=True):
        assert torch.equal(first, second)


@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 5), t=st.integers(1, 60), d=st.integers(1, 40))
def test_any_size(n: int, t: int, d: int) -> None:
    normed = random(n, t, d, dtype=torch.float32)
    grad = random(n, t, d, dtype=torch.float32, seed=1)
    check_norm(norm_sample_grads(normed, grad), normed, grad)
