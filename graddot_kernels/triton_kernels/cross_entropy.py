"""Softmax cross-entropy and its gradient in place of the logits: a program a row, read twice."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..torch_impl import check_labels
from .config import Tile
from .launch import choose_tile, on_device, options


@triton.jit
def _see(b_x, b_most, b_sum):
    """The largest logit and Σ exp(x - largest) of each group, (R,), with b_x, (R, G), seen too."""
    b_new = tl.maximum(b_most, tl.max(b_x, 1))
    # Where a group has seen no logit yet, or only masked ones, -inf - -inf would be NaN.
    b_from = tl.where(b_new == -float("inf"), 0.0, b_new)
    b_sum = b_sum * tl.exp(b_most - b_from) + tl.sum(tl.exp(b_x - b_from[:, None]), 1)
    return b_new, b_sum


@triton.jit
def _write_grad(b_x, p_logits, o_v, vocab, label, used, lse, factor, spread, smoothing):
    b_grad = tl.exp(b_x - lse) * factor - spread
    b_grad -= tl.where(o_v == label, 1 - smoothing, 0.0)
    b_grad = tl.where(used, b_grad, 0.0)
    tl.store(p_logits + o_v, b_grad.to(p_logits.dtype.element_ty), mask=o_v < vocab)


@triton.jit
def cross_entropy_kernel(
    p_logits, p_labels, p_losses, vocab, stride, ignore_index, smoothing, z_loss,
    BV: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Row i of the logits becomes the gradient of its loss, 0 where the label is ignored.

    GROUP logits, those of one load, have one largest logit and one sum: of each logit by itself
    these would fill the registers, and every logit would take two exponentials.
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
    label = tl.where(valid, label, -1).to(tl.int32)  # compared with every column
    even = vocab // 16 * 16
    o_tail = even + tl.arange(0, 16)
    o_group = tl.arange(0, BV // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    b_most = tl.full((BV // GROUP,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BV // GROUP,), tl.float32)
    b_plain = tl.zeros((BV // GROUP,), tl.float32)
    for i_v in range(0, even, BV):
        o_v = i_v + o_group
        b_x = tl.load(p_logits + o_v, mask=o_v < even, other=-float("inf")).to(tl.float32)
        b_most, b_sum = _see(b_x, b_most, b_sum)
        if smoothing > 0:
            b_plain += tl.sum(tl.where(o_v < even, b_x, 0.0), 1)
    b_tail = tl.load(p_logits + o_tail, mask=o_tail < vocab, other=-float("inf")).to(tl.float32)
    plain = tl.sum(b_plain, 0) + tl.sum(tl.where(o_tail < vocab, b_tail, 0.0), 0)
    most = tl.maximum(tl.max(b_most, 0), tl.max(b_tail, 0))
    start = tl.where(most == -float("inf"), 0.0, most)
    total = tl.sum(b_sum * tl.exp(b_most - start), 0) + tl.sum(tl.exp(b_tail - start), 0)
    lse = most + tl.log(total)
    loss = lse - (1 - smoothing) * at_label
    loss -= tl.where(smoothing == 0, 0.0, smoothing * plain / vocab)
    tl.store(p_losses + i_row, tl.where(used, loss + z_loss * lse * lse, 0.0))
    factor, spread = 1 + 2 * z_loss * lse, smoothing / vocab
    for i_v in range(0, even, BV):
        o_v = i_v + o_group
        b_x = tl.load(p_logits + o_v, mask=o_v < even, other=0.0).to(tl.float32)
        _write_grad(b_x, p_logits, o_v, even, label, used, lse, factor, spread, smoothing)
    _write_grad(b_tail, p_logits, o_tail, vocab, label, used, lse, factor, spread, smoothing)


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
                label_smoothing, z_loss, BV=tile.cols, GROUP=16 // logits.itemsize, **options(tile),
            )  # fmt: skip
    return losses
