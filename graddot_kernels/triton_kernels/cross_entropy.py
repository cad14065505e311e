"""Softmax cross-entropy and its gradient in place of the logits: a program a row, read twice."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..torch_impl import check_labels
from .config import Tile
from .launch import choose_tile, on_device, options


@triton.jit
def _see(p_logits, o_v, vocab, b_most, b_sum, b_plain):
    """The largest logit, Σ exp(x - largest) and Σ x of each lane, with those at o_v."""
    b_x = tl.load(p_logits + o_v, mask=o_v < vocab, other=-float("inf")).to(tl.float32)
    b_new = tl.maximum(b_most, b_x)
    # exp(-inf - -inf) would be NaN where a lane has seen no logit yet, or only masked ones.
    b_sum = tl.where(b_most == -float("inf"), 0.0, b_sum * tl.exp(b_most - b_new))
    b_sum += tl.where(b_x == -float("inf"), 0.0, tl.exp(b_x - b_new))
    b_plain += tl.where(o_v < vocab, b_x, 0.0)
    return b_new, b_sum, b_plain


@triton.jit
def _write_grad(p_logits, o_v, vocab, label, used, lse, factor, spread, smoothing):
    b_x = tl.load(p_logits + o_v, mask=o_v < vocab, other=0.0).to(tl.float32)
    b_grad = tl.exp(b_x - lse) * factor - spread
    b_grad -= tl.where(o_v == label, 1 - smoothing, 0.0)
    b_grad = tl.where(used, b_grad, 0.0)
    tl.store(p_logits + o_v, b_grad.to(p_logits.dtype.element_ty), mask=o_v < vocab)


@triton.jit
def cross_entropy_kernel(
    p_logits, p_labels, p_losses, vocab, stride, ignore_index, smoothing, z_loss,
    BV: tl.constexpr,
):  # fmt: skip
    """Row i of the logits becomes the gradient of its loss, 0 where the label is ignored.

    Tokens beyond a multiple of 16 go by themselves: a mask that ends among them would make all
    loads and stores scalar ones.
    """
    i_row = tl.program_id(0).to(tl.int64)
    p_logits += i_row * stride
    label = tl.load(p_labels + i_row)
    used = label != ignore_index
    valid = (label >= 0) & (label < vocab)
    # A label that is no token makes its loss NaN, which no training run overlooks. Read before the
    # sums over all threads, which no thread passes, to write gradients, until every other has read.
    at_label = tl.load(p_logits + label, mask=valid, other=float("nan")).to(tl.float32)
    even = vocab // 16 * 16
    o_tail = even + tl.arange(0, BV)
    b_most = tl.full((BV,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BV,), tl.float32)
    b_plain = tl.zeros((BV,), tl.float32)
    for i_v in range(0, even, BV):
        o_v = i_v + tl.arange(0, BV)
        b_most, b_sum, b_plain = _see(p_logits, o_v, even, b_most, b_sum, b_plain)
    if even < vocab:
        b_most, b_sum, b_plain = _see(p_logits, o_tail, vocab, b_most, b_sum, b_plain)
    most = tl.max(b_most, 0)
    total = tl.sum(tl.where(b_most == -float("inf"), 0.0, b_sum * tl.exp(b_most - most)), 0)
    lse = most + tl.log(total)
    loss = lse - (1 - smoothing) * at_label
    loss -= tl.where(smoothing == 0, 0.0, smoothing * tl.sum(b_plain, 0) / vocab)
    tl.store(p_losses + i_row, tl.where(used, loss + z_loss * lse * lse, 0.0))
    factor, spread = 1 + 2 * z_loss * lse, smoothing / vocab
    for i_v in range(0, even, BV):
        o_v = i_v + tl.arange(0, BV)
        _write_grad(p_logits, o_v, even, label, used, lse, factor, spread, smoothing)
    if even < vocab:
        _write_grad(p_logits, o_tail, vocab, label, used, lse, factor, spread, smoothing)


def cross_entropy_grad(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    tile: Tile | None = None,
) -> Tensor:
    """Losses (R,) in fp32 of logits (R, vocab), which become the losses' gradients."""
    check_labels(logits, labels)
    rows, vocab = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows > 0:
        assert logits.stride(1) == 1
        tile = tile or choose_tile("cross_entropy", logits)
        with on_device(logits):
            cross_entropy_kernel[(rows,)](
                logits, labels.long().contiguous(), losses, vocab, logits.stride(0), ignore_index,
                label_smoothing, z_loss, BV=tile.cols, **options(tile),
            )  # fmt: skip
    return losses
