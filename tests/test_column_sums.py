"""Sums over a sample's tokens, as of a bias's gradient, against float64."""

import pytest
import torch

from graddot_kernels import cpu_kernels
from graddot_kernels.torch_impl import column_sums

SHAPES = [(1, 1, 3), (3, 128, 7), (2, 300, 200), (4, 16, 768), (0, 3, 5), (2, 0, 5), (3, 4, 0)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_strides(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(sum(shape))
    x = torch.randn(shape).to(dtype)
    n, t, d = shape
    second = x.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.randn(n, t, 3 * d + 2).to(dtype)[:, :, 2::3].copy_(x)
    for same in (x, second, wide, x.mT.contiguous().mT, torch.cat([x, x], 2)[:, :, :d]):
        got = column_sums(same)
        assert got.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert got.shape == (n, d)
        error = (got - x.double().sum(1)).abs()
        assert (error <= 3e-7 * x.double().abs().sum(1)).all()
    one = x[:, :1].expand(n, t, d)  # the same numbers for every token
    want = x[:, :1].double().sum(1) * t
    torch.testing.assert_close(column_sums(one).double(), want, rtol=2e-6, atol=0)


@pytest.mark.skipif(
    not cpu_kernels.available(torch.empty(0)), reason="no vector kernels for this processor"
)
def test_as_exact_as_pytorch() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 1000, 300)
    want = x.double().sum(1)
    assert (column_sums(x) - want).norm() < 1.5 * (x.sum(1) - want).norm()


def test_number_of_threads() -> None:
    """The sums are the same bit by bit."""
    x, threads = torch.randn(3, 1000, 300).bfloat16(), torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(column_sums(x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)
