"""A language-model head and its cross-entropy, chunk by chunk: the logits never exist as a whole.

A chunk's logits become their own gradient in place, and that gives at once the gradient of the
hidden states, the weight gradient and the dots. The val rows come first: their weight gradient is
the direction that every training chunk is dotted with. Where all logits take less memory than the
directions of many targets would, they are one chunk, and no direction is held. One form for all
devices, on top of the other ops.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu_kernels
from .sample_dots import linear_sample_rows, squares
from .torch_impl import column_sums, mm

# Logits that exist at a time. On a CPU 256 MB, twice as many of 16 bits: its matrix products repack
# the weight, and read and write the weight gradient, for every chunk, and with half of that took some
# 7 % longer. On a GPU enough to fill it. Every training chunk reads all directions: many of them allow as many logits as
# a quarter of their own size.
_CHUNK_ELEMENTS = {"cpu": 2**26, "cuda": 2**27}

# On a CPU, the last call's table of directions, or the logits in its place, as flat memory. Freed, it
# goes back to the operating system, whose pages for the next cost 4 % of a step. The step's peak of
# memory has it in any case; to keep the logits' buffer as well would raise the peak.
_kept: dict[torch.dtype, Tensor] = {}


def tokens_at_a_time(act: Tensor, vocab: int) -> int:
    """Whose logits exist together, given their hidden states."""
    share = 2 if act.device.type == "cpu" and act.itemsize == 2 else 1
    return max(1, share * _CHUNK_ELEMENTS[act.device.type] // max(1, vocab))


class _Chunk(NamedTuple):
    """Tokens [t0, t1) of rows [r0, r1): whole rows, or part of one."""

    r0: int
    r1: int
    t0: int
    t1: int

    def of(self, x: Tensor) -> Tensor:
        return x[self.r0 : self.r1, self.t0 : self.t1]


def _chunks(begin: int, end: int, tokens: int, limit: int) -> Iterator[_Chunk]:
    """Rows [begin, end) in chunks of at most `limit` tokens, as equal as they can be."""
    if tokens == 0 or begin == end:
        return
    if tokens <= limit:
        parts = -(-(end - begin) // (limit // tokens))
        rows = -(-(end - begin) // parts)
        for r in range(begin, end, rows):
            yield _Chunk(r, min(r + rows, end), 0, tokens)
    else:
        size = -(-tokens // -(-tokens // limit))
        for r in range(begin, end):
            for t in range(0, tokens, size):
                yield _Chunk(r, r + 1, t, min(t + size, tokens))


def _add_product(total: Tensor, grad: Tensor, act: Tensor, *, first: bool, scale: float) -> None:
    """total (+)= scale · Σ gradᵀ act over rows and tokens, accumulated in total's dtype."""
    tokens = grad.shape[0] * grad.shape[1]
    own = grad.dtype != total.dtype and cpu_kernels.available(grad)
    if own or cpu_kernels.product_available(grad, len(total), total.shape[1], tokens):
        cpu_kernels.linear_wgrad_dot(total, None, [], act, grad, scale, not first)
        return
    grad, act = grad.flatten(0, 1), act.flatten(0, 1)
    if grad.dtype == total.dtype:
        torch.addmm(total, grad.t(), act, beta=0 if first else 1, alpha=scale, out=total)
        return
    if grad.is_cuda:
        product = torch.mm(grad.t(), act, out_dtype=total.dtype)
    else:
        product = torch.mm(grad.t().to(total.dtype), act.to(total.dtype))
    if first:
        torch.mul(product, scale, out=total)
    else:
        total.add_(product, alpha=scale)


class _Head:
    """One call: what it was given, what it returns, and the buffer of a chunk's logits."""

    def __init__(
        self, act: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, val_rows: list[int],
        direction: Tensor | None, val_ids: Tensor, loss: tuple[int, float, float],
        scale: Tensor | None, weight_needed: bool, own_ids: Tensor | None, norms: bool,
    ) -> None:  # fmt: skip
        self.kept: Tensor | None = None
        self.act, self.weight, self.bias, self.labels = act, weight.to(act.dtype), bias, labels
        self.val_ids, self.loss = val_ids, loss
        # Once: where a chunk's products want it on the device, they would wait for a copy each.
        self.scale = None if scale is None else scale.to(act.device)
        self.vocab, self.width = weight.shape
        (rows, t), k = labels.shape, len(val_rows)
        self.n = rows - sum(val_rows)
        dtype = torch.float64 if act.dtype == torch.float64 else torch.float32
        self.losses = act.new_zeros(rows, t, dtype=dtype)
        self.act_grad = torch.zeros_like(act, memory_format=torch.contiguous_format)
        self.bias_rows = self.losses.new_zeros(rows if bias is not None else 0, self.vocab)
        self.columns = act.new_zeros(self.n, t, val_ids.numel())
        k = 0 if not weight_needed else k if direction is None else direction.shape[0]
        self.k, self.norms = k, norms and k > 0
        self.dots = self.losses.new_zeros(k, self.n)
        if self.norms:
            self.dots = self.losses.new_zeros(k + 1, self.n + (direction is None))
        self.own_ids = labels.new_empty(self.n, 0) if own_ids is None else own_ids
        self.own_rows = self.losses.new_zeros(*self.own_ids.shape, self.width)
        self.limit = tokens_at_a_time(act, self.vocab)
        # Only a CPU's joint op makes directions piece by piece, and in PyTorch it would widen logits
        # of 16 bits.
        self.joint = direction is None and k > 0 and not act.is_cuda
        self.joint &= act.dtype == dtype or cpu_kernels.available(act)
        as_large = k * self.width * dtype.itemsize // act.itemsize
        self.joint &= 0 < rows * t <= max(self.limit, as_large)
        if direction is None:
            directions = 0 if self.joint else k
            direction = self._memory_kept(self.losses, directions, self.vocab, self.width)
        self.direction = direction
        held = self.vocab if weight_needed and not self.joint else 0
        self.weight_grad = self._large(self.losses, held, self.width)
        self.direction_rows = direction.new_empty(self.k, 0, self.width)
        if len(direction) > 0 and act.device.type == "cpu":
            # Beside directions the logits of a small batch would be the step's peak of memory.
            self.limit = min(self.limit, max(1, -(-self.n // 3) * t))
        self.limit = max(self.limit, rows * t if self.joint else len(direction) * self.width // 4)
        # A norm is of a sample's chunks together: whole rows, or a buffer where that takes less.
        if self.norms and self.limit < t <= self.limit + self.width:
            self.limit = t
        # Rows that begin at a cache line: the products of an odd vocabulary took a fifth longer.
        line = 64 // act.itemsize
        padded = -(-self.vocab // line) * line
        memory = self._memory_kept if self.joint else self._large
        logits = memory(act, min(self.limit, rows * t), padded)
        if act.device.type == "cpu":
            # Where oneDNN's bf16 products read on, times 0: of a NaN left in that memory they are NaN.
            logits[:, self.vocab :].zero_()
        self.logits = logits[:, : self.vocab]
        self.row_grad: Tensor | None = None
        if self.norms and self.limit < t:
            self.row_grad = self._large(self.losses, self.vocab, self.width)

    @staticmethod
    def _large(like: Tensor, *shape: int) -> Tensor:
        new = like.new_empty(shape)
        cpu_kernels.advise_huge_pages(new)
        return new

    def _memory_kept(self, like: Tensor, *shape: int) -> Tensor:
        """A table of like's dtype, with what the last call left in it."""
        size = math.prod(shape)
        if like.device.type != "cpu" or size == 0:  # a GPU's allocator keeps what is freed
            return like.new_empty(shape)
        # Taken out, so that a call in another thread makes its own.
        kept = _kept.pop(like.dtype, None)
        if kept is None or not size <= kept.numel() <= 2 * size:
            del kept
            with torch.inference_mode(False):  # else a training step could not write to it
                kept = self._large(torch.empty(0, dtype=like.dtype, device=like.device), size)
        self.kept = kept
        return kept[:size].view(shape)

    def gradient_of_logits(self, chunk: _Chunk) -> Tensor:
        """(rows, tokens, vocab) of the chunk, in the buffer; losses and act_grad on the way."""
        act = chunk.of(self.act).flatten(0, 1)
        grad = mm(act, self.weight.t(), out=self.logits[: act.shape[0]])
        if self.bias is not None:
            grad.add_(self.bias.to(grad.dtype))
        labels = chunk.of(self.labels).flatten()
        losses = torch.ops.graddot.cross_entropy_grad(grad, labels, *self.loss)
        shape = (chunk.r1 - chunk.r0, chunk.t1 - chunk.t0, -1)
        chunk.of(self.losses).copy_(losses.view(shape[:2]))
        chunk.of(self.act_grad).copy_(mm(grad, self.weight).view(shape))
        grad = grad.view(shape)
        if self.bias is not None:
            self.bias_rows[chunk.r0 : chunk.r1] += column_sums(grad)
        return grad

    def begins(self, val_rows: list[int]) -> list[int]:
        """The first row of every target, and the end of the last."""
        return list(itertools.accumulate(val_rows, initial=self.n))

    def run_joint(self, val_rows: list[int], train_ids: Tensor) -> None:
        """All rows in one chunk, with logits in the place of directions."""
        chunk = _Chunk(0, self.labels.shape[0], 0, self.labels.shape[1])
        grad = self.gradient_of_logits(chunk)
        self.columns.copy_(grad[: self.n][..., self.val_ids])
        self.weight_grad, self.dots = torch.ops.graddot.linear_joint_wgrad_dot(
            self.act, grad, val_rows, self.scale, self.norms
        )
        if self.own_ids.numel():
            train = self.act[: self.n], grad[: self.n]
            self.own_rows = linear_sample_rows(*train, self.own_ids)
        groups = itertools.pairwise(self.begins(val_rows))
        parts = [(grad[lo:hi][..., train_ids], self.act[lo:hi]) for lo, hi in groups]
        pairs = [(b.flatten(0, 1).t(), a.flatten(0, 1)) for b, a in parts]
        kind = self.losses.dtype
        self.direction_rows = torch.stack([b.to(kind) @ a.to(kind) for b, a in pairs])

    def run_val(self, val_rows: list[int]) -> None:
        """The val rows, those of all targets in the same chunks; fills `direction` if wanted."""
        if val_rows and self.labels.numel() == 0:  # the table is ours, and no chunk will fill it
            self.direction.zero_()
        begins = self.begins(val_rows)
        for chunk in _chunks(self.n, begins[-1], self.labels.shape[1], self.limit):
            grad, act = self.gradient_of_logits(chunk), chunk.of(self.act)
            for k in range(self.k):
                lo, hi = max(chunk.r0, begins[k]), min(chunk.r1, begins[k + 1])
                if lo < hi:
                    own = slice(lo - chunk.r0, hi - chunk.r0)
                    first = lo == begins[k] and chunk.t0 == 0
                    _add_product(self.direction[k], grad[own], act[own], first=first, scale=1.0)
        if self.dots.shape[1] > self.n:
            self.dots[: self.k, self.n] = squares(self.direction)

    def run_train(self) -> None:
        """The training rows, whose weight gradient goes into `weight_grad` if wanted."""
        on_host = self.scale is not None and not self.scale.is_cuda
        alpha = float(self.scale) if on_host else 1.0  # type: ignore[arg-type]
        first = True
        for chunk in _chunks(0, self.n, self.labels.shape[1], self.limit):
            grad, act = self.gradient_of_logits(chunk), chunk.of(self.act)
            if self.val_ids.numel():
                chunk.of(self.columns).copy_(grad[..., self.val_ids])
            if self.own_ids.numel():
                own = slice(chunk.r0, chunk.r1)
                self.own_rows[own] += linear_sample_rows(act, grad, self.own_ids[own])
            if self.row_grad is not None:
                self._add_part_of_row(chunk, grad, act, self.row_grad)
            elif self.dots.numel():
                self.dots[:, chunk.r0 : chunk.r1] += torch.ops.graddot.linear_wgrad_dot_into(
                    self.weight_grad, None, self.direction, act, grad, self.scale, not first,
                    self.norms,
                )  # fmt: skip
            elif self.weight_grad.numel():
                _add_product(self.weight_grad, grad, act, first=first, scale=alpha)
            first = False
        if first:
            self.weight_grad.zero_()
        elif self.scale is not None and not on_host and not self.dots.numel():
            self.weight_grad.mul_(self.scale)  # its value is not known on the host

    def _add_part_of_row(self, chunk: _Chunk, grad: Tensor, act: Tensor, total: Tensor) -> None:
        """One sample's gradient in a buffer of its own, which its last chunk adds to the rest."""
        self.dots[: self.k, chunk.r0 : chunk.r1] += torch.ops.graddot.linear_wgrad_dot_into(
            total, None, self.direction, act, grad, None, chunk.t0 > 0
        )
        if chunk.t1 < self.labels.shape[1]:
            return
        self.dots[self.k, chunk.r0] = squares(total[None])[0]
        if self.scale is not None:
            total.mul_(self.scale)
        if chunk.r0 == 0:
            self.weight_grad.copy_(total)
        else:
            self.weight_grad.add_(total)


def linear_cross_entropy(
    act: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    val_rows: list[int],
    direction: Tensor | None,
    val_ids: Tensor,
    train_ids: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    weight_scale: Tensor | None,
    weight_needed: bool,
    own_ids: Tensor | None = None,
    norms: bool = False,
) -> tuple[Tensor, ...]:
    """The head's losses and everything that the backward of their sum gives.

    act (rows, T, d): N training rows, then val_rows[k] rows of target k; weight (vocab, d), bias
    (vocab,), labels (rows, T). G_i is sample i's gradient of the weight, D_k that of target k's
    rows, or `direction`, (K, vocab, d), given in place of val rows.

    Returns losses (rows, T); the gradient of act; weight_scale · Σ_i G_i over the training rows;
    the bias gradient of every row (rows, vocab); ⟨D_k, G_i⟩ (K, N); the training rows' gradient of
    the logits at the tokens `val_ids`, (N, T, U); and D_k's rows `train_ids`, (K, U', d): what an
    embedding that shares the weight needs for its cross terms; and for its norms, if `own_ids`,
    (N, T'), are given, G_i's own rows of these, (N, T', d). `norms` borders the dots as in
    `functional`, in the scale of this loss. What is not needed is empty.
    """
    given = direction is not None
    if min(val_rows, default=1) < 1 or sum(val_rows) > len(act) or (given and val_rows):
        raise ValueError(
            f"val_rows has {val_rows}; expected positive row counts, at most {len(act)} in all, and"
            " none beside a given direction"
        )
    head = _Head(
        act, weight, bias, labels, val_rows, direction, val_ids,
        (ignore_index, label_smoothing, z_loss), weight_scale, weight_needed, own_ids, norms,
    )  # fmt: skip
    if head.joint:
        head.run_joint(val_rows, train_ids)
    else:
        head.run_val(val_rows)
        head.run_train()
        if train_ids.numel() and weight_needed:
            head.direction_rows = head.direction[: head.k, train_ids]
    if head.kept is not None:
        _kept[head.kept.dtype] = head.kept
    return (
        head.losses, head.act_grad, head.weight_grad, head.bias_rows, head.dots,
        head.columns, head.direction_rows, head.own_rows,
    )  # fmt: skip
