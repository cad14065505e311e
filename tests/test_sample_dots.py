"""Dots of a sample's gradients with each other, and the head's norms, against the definitions."""

import pytest
import torch
from kernel_checks import FP32_ERROR, assert_within, inputs, token_norms
from linear_problems import DTYPES
from torch import Tensor

from graddot_kernels import fused_head, reference, sample_dots

KINDS = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
IDS = torch.tensor([[3, 1, 3, 0], [2, 2, 2, 2], [0, 4, 1, 3]])


def tolerance(dtype: torch.dtype) -> float:
    return 1e-14 if dtype == torch.float64 else FP32_ERROR


@KINDS
@pytest.mark.parametrize("block", [1, 2 * 7 * 5, 10**6])
def test_linear(dtype: torch.dtype, block: int, monkeypatch) -> None:
    monkeypatch.setattr(sample_dots, "_BLOCK_ELEMENTS", block)
    one, other = inputs(5, 7, 9, 4, dtype=dtype), inputs(5, 5, 9, 4, dtype=dtype, seed=3)
    got = sample_dots.linear_sample_dot(*one, *other)
    grads = [reference.linear_sample_grads(*(x.double() for x in pair)) for pair in (one, other)]
    bound = token_norms(*one).sum(1) * token_norms(*other).sum(1)
    assert_within(got, (grads[0] * grads[1]).sum((1, 2)), bound, tolerance(dtype))


@KINDS
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("case", ["self", "other", "expanded"])
def test_embedding(dtype: torch.dtype, padding: int | None, case: str) -> None:
    """Repeated ids, ids that only one of two uses has, and ids that are the same for every row."""
    grad, other_grad = inputs(3, 4, 6, 6, dtype=dtype)
    ids, other_ids = IDS, IDS.flip(1)[:, :3]
    other_grad = other_grad[:, :3]
    if case == "self":
        other_ids, other_grad = ids, grad
    if case == "expanded":
        ids = torch.arange(4)[None].expand(3, 4)
    got = sample_dots.embedding_sample_dot(ids, grad, other_ids, other_grad, padding)
    one, other = (
        reference.embedding_sample_grads(i, g.double(), 5, padding)
        for i, g in ((ids, grad), (other_ids, other_grad))
    )
    bound = grad.double().norm(dim=2).sum(1) * other_grad.double().norm(dim=2).sum(1)
    assert_within(got, (one * other).sum((1, 2)), bound, tolerance(dtype))


@pytest.mark.parametrize("shape", [(0, 4, 6), (3, 0, 6), (3, 4, 0)], ids=str)
def test_embedding_of_nothing(shape: tuple[int, ...]) -> None:
    grad = torch.randn(shape)
    ids = torch.zeros(shape[:2], dtype=torch.long)
    got = sample_dots.embedding_sample_dot(ids, grad, ids.clone(), grad, None)
    assert torch.equal(got, torch.zeros(shape[0]))


def logit_grads(act: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (act @ weight.t()).flatten(0, 1)
    grads = reference.cross_entropy_grad(logits, labels.flatten(), -100, 0.0, 0.0)[1]
    return grads.view(*labels.shape, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    "chunk", [2, 3, 14, 100], ids=["part-rows", "whole-row", "two-rows", "all"]
)
@pytest.mark.parametrize("given", [False, True], ids=["riding", "given"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_fused_head(dtype, chunk: int, given: bool, scale: float | None, monkeypatch) -> None:
    monkeypatch.setitem(fused_head._CHUNK_ELEMENTS, "cpu", 5 * chunk)
    act, weight = inputs(6, 7, 4, 4, dtype=dtype)[0], inputs(1, 5, 4, 1, dtype=dtype)[0][0]
    labels = IDS.repeat(2, 2)[:, :7].clone()
    labels[0, 3:], labels[4, 1] = -100, -100
    val_rows = [] if given else [1, 2]
    train = 6 - sum(val_rows)
    direction = inputs(2, 5, 4, 1, dtype=dtype, seed=5)[0] if given else None
    own_ids, none = IDS.repeat(2, 1)[:train], labels.new_empty(0)
    factor = None if scale is None else torch.tensor(scale, dtype=dtype)
    args = act, weight, None, labels, val_rows, direction, none, none, -100, 0.0, 0.0, factor, True
    plain = torch.ops.graddot.linear_cross_entropy(*args)
    got = torch.ops.graddot.linear_cross_entropy(*args, own_ids, True)
    a, b = act.double(), logit_grads(act.double(), weight.double(), labels)
    grads = reference.linear_sample_grads(a, b)
    bound = token_norms(a, b).sum(1)
    limit = 1e-14 if dtype == torch.float64 else 4 * FP32_ERROR  # the logits are rounded, too
    dots = got[4]
    assert dots.shape == (3, train + (not given))
    assert_within(dots[:2, :train], plain[4], bound.max().square(), limit)
    assert_within(got[2], plain[2], bound.sum(), limit)
    squares = grads[:train].square().sum((1, 2))
    assert_within(dots[2, :train], squares, bound[:train].square(), limit)
    if not given:
        column = torch.stack([g.sum(0).square().sum() for g in grads[3:].split([1, 2])])
        assert_within(dots[:2, 3], column, bound.sum().square(), limit)
        assert dots[2, 3] == 0
    rows = grads[:train].gather(1, own_ids[..., None].expand(-1, -1, 4))
    assert_within(got[7], rows, bound[:train, None, None], limit)
