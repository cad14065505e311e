"""The cross-entropy kernel against float64 in Triton's interpreter."""

import pytest
import torch
from kernel_checks import random

from graddot_kernels import reference
from graddot_kernels.triton_kernels.cross_entropy import cross_entropy_grad

SHAPES = [(1, 1), (3, 15), (4, 16), (5, 17), (2, 100), (2, 61), (0, 7)]


@pytest.mark.parametrize("extras", [(0.0, 0.0), (0.1, 1e-2)], ids=["plain", "smoothing-z_loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=["rows={}-vocab={}".format(*s) for s in SHAPES])
def test_cross_entropy(shape: tuple[int, int], dtype: torch.dtype, extras) -> None:
    rows, vocab = shape
    whole = random(rows, vocab + 3, dtype=dtype) * 5
    logits = whole[:, :vocab]
    labels = torch.arange(rows) * 7 % vocab
    labels[2:3] = -100
    want, want_grad = reference.cross_entropy_grad(logits.double(), labels, -100, *extras)
    size = logits.double().abs().max() if rows else 0.0
    beyond = whole[:, vocab:].clone()
    losses = cross_entropy_grad(logits, labels, -100, *extras)
    assert ((losses - want).abs() <= 1e-6 * size).all()
    assert ((logits - want_grad).abs() <= (1e-3 if dtype == torch.float16 else 2e-6)).all()
    assert torch.equal(whole[:, vocab:], beyond)


def test_masked_logits_and_wrong_labels() -> None:
    logits = random(3, 40, dtype=torch.float32)
    logits[:, :20] = -float("inf")
    labels = torch.tensor([25, 40, -1])
    plain = logits.double()
    losses = cross_entropy_grad(logits, labels, -100, 0.0, 0.0)
    want, want_grad = reference.cross_entropy_grad(plain[:1], labels[:1], -100, 0.0, 0.0)
    assert abs(losses[0] - want[0]) <= 1e-5
    assert (logits[:1] - want_grad).abs().max() <= 2e-6
    assert losses[1:].isnan().all()  # no token: never a plausible number


def test_labels_of_int32_and_uint8() -> None:
    logits = random(3, 40, dtype=torch.float32)
    labels = torch.tensor([25, 39, 0])
    want = cross_entropy_grad(logits.clone(), labels, -100, 0.0, 0.0)
    for dtype in (torch.int32, torch.uint8):
        got = cross_entropy_grad(logits.clone(), labels.to(dtype), -100, 0.0, 0.0)
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match="labels has dtype torch.float32; expected integers"):
        cross_entropy_grad(logits, labels.float(), -100, 0.0, 0.0)
