"""The ops in plain PyTorch, arranged to be fast on a CPU and correct on any device.

Same signatures as the ops (`padding_idx` -1 for none); the definitions are in `reference`. Where
the processor has them, compiled kernels do the fused route's inner work (`cpu_kernels`).
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu_kernels
from .sample_dots import bordered, linear_sample_dot, squares

# Elements of one tile of a weight gradient. A sample's tile, the direction's and the running sum
# are read right after they are written; 2M elements of each stay in a server's last-level cache,
# while the matrix product over T still has enough rows to run at full rate (smaller tiles lost
# 10-50 % of it on an EPYC core pair, larger ones nothing either way).
_TILE_ELEMENTS = 2 * 1024 * 1024
# Elements of one block of token-by-token products (the gram route's only temporary).
_GRAM_ELEMENTS = 4 * 1024 * 1024
# Measured on the same machine: multiply-adds that a matrix product does in the time in which the
# fused route handles one more element of a sample's weight gradient (write, dot, add). Only their
# ratio matters: it decides which exact route is cheaper, never what the result is.
_MACS_PER_FUSED_ELEMENT = 40
_MACS_PER_FUSED_ELEMENT_COMPILED = 12
# A compiled kernel is one call, the other routes ten operations of PyTorch and more: 40 µs, in which
# a matrix product does so many multiply-adds.
_MACS_OF_CALLS = 1_000_000


def _fused_is_cheaper(x: Tensor, elements: int, macs: int) -> bool:
    """Than another route of so many multiply-adds; elements are those of all samples' gradients."""
    if cpu_kernels.available(x):
        return _MACS_PER_FUSED_ELEMENT_COMPILED * elements <= macs + _MACS_OF_CALLS
    return _MACS_PER_FUSED_ELEMENT * elements <= macs


def _accumulated(x: Tensor) -> Tensor:
    """x in the dtype that results are accumulated in: fp64 for fp64, else fp32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _tokens(x: Tensor) -> Tensor:
    """(N, T, D) as (N·T, D), a view when the rows allow it."""
    return x.flatten(0, -2)


def mm(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """x @ y by whichever is faster; into rows of unit stride."""
    if cpu_kernels.product_available(x, x.shape[0], y.shape[1], x.shape[1]):
        return cpu_kernels.product(x, y, out)
    return torch.mm(x, y, out=out)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, (M, Din) and (Dout, Din), by whichever is faster."""
    if cpu_kernels.product_available(x, len(x), len(weight), x.shape[1]):
        out = None if bias is None else bias.expand(len(x), -1).contiguous()
        return cpu_kernels.product(x, weight.t(), out, accumulate=bias is not None)
    return F.linear(x, weight, bias)


def column_sums(x: Tensor) -> Tensor:
    """Σ_t x of every sample of x (N, T, D), accumulated: (N, D) in fp64 for fp64, else fp32."""
    if cpu_kernels.available(x):
        return cpu_kernels.column_sums(x)
    return x.sum(1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def mm_fp32(x: Tensor, y: Tensor) -> Tensor:
    """x @ y accumulated and returned in fp32, without a rounding of 16-bit results."""
    if x.is_cuda and x.dtype != torch.float32 and 0 not in (*x.shape, *y.shape):
        return torch.mm(x, y, out_dtype=torch.float32)
    return mm(x.float(), y.float())


def products_fp32(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ_t b_t a_tᵀ of each pair a (T, Din), b (T, Dout), by `mm_fp32`: (K, Dout, Din)."""
    products = [mm_fp32(b.t(), a) for a, b in pairs]
    return products[0].unsqueeze(0) if len(products) == 1 else torch.stack(products)


def _scaled_(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x.mul_(scale)


def _sum_by_group(pairs: Tensor, val_rows: list[int]) -> Tensor:
    """(V, N) row sums by consecutive groups of val_rows rows, (K, N)."""
    if len(val_rows) == 1:
        return pairs.sum(0, keepdim=True)
    return torch.stack([group.sum(0) for group in torch.split(pairs, val_rows)])


def linear_gram_dot(
    val_act: Tensor, val_grad: Tensor, train_act: Tensor, train_grad: Tensor, pairwise: bool
) -> Tensor:
    """⟨G_v, G_i⟩ = Σ_st (a_vs·a_it)(b_vs·b_it), in blocks of samples.

    Val tokens lie along the rows of a block: at T=16 a third of the time went into sums across them.
    """
    v, s, _ = val_act.shape
    n, t, _ = train_act.shape
    pairs = _accumulated(train_act.new_zeros(v, n))
    if 0 in (v, n, s, t):
        return pairs if pairwise else pairs.sum(0)
    v_block = min(v, max(1, _GRAM_ELEMENTS // (s * t)))
    n_block = min(n, max(1, _GRAM_ELEMENTS // (s * t * v_block)))
    for j in range(0, v, v_block):
        val_acts = _accumulated(_tokens(val_act[j : j + v_block])).t()
        val_grads = _accumulated(_tokens(val_grad[j : j + v_block])).t()
        for i in range(0, n, n_block):
            block = mm(_accumulated(_tokens(train_act[i : i + n_block])), val_acts)
            block *= mm(_accumulated(_tokens(train_grad[i : i + n_block])), val_grads)
            by_token = block.view(-1, t, min(v_block, v - j), s).sum(3)
            pairs[j : j + v_block, i : i + n_block] = by_token.sum(1).t()
    return pairs if pairwise else pairs.sum(0)


def linear_direction_dot(direction: Tensor, act: Tensor, grad: Tensor, per_token: bool) -> Tensor:
    """b_itᵀ D_k a_it: one matrix product a direction, then a row dot with the narrower side."""
    n, t, d_in = act.shape
    acts, grads = _accumulated(_tokens(act)), _accumulated(_tokens(grad))
    out = acts.new_empty(direction.shape[0], n, t)
    for k, one in enumerate(_accumulated(direction)):
        if d_in < grads.shape[1]:
            torch.sum(mm(grads, one).mul_(acts), 1, out=out[k].view(-1))
        else:
            torch.sum(mm(acts, one.t()).mul_(grads), 1, out=out[k].view(-1))
    return out if per_token else out.sum(-1)


def _empty_weight_grad(act: Tensor, grad: Tensor) -> Tensor:
    weight_grad = _accumulated(act.new_empty(0)).new_empty(grad.shape[2], act.shape[2])
    cpu_kernels.advise_huge_pages(weight_grad)
    return weight_grad


def _weight_grad(act: Tensor, grad: Tensor, scale: Tensor | None) -> Tensor:
    acts, grads = _tokens(act), _tokens(grad)
    own = act.itemsize == 2 and cpu_kernels.available(act)  # PyTorch would widen both sides
    if own or cpu_kernels.product_available(act, grads.shape[1], acts.shape[1], len(acts)):
        total = _empty_weight_grad(act, grad)
        cpu_kernels.linear_wgrad_dot(total, None, [], acts[None], grads[None], scale, False)
        return total
    return _scaled_(torch.mm(_accumulated(grads).t(), _accumulated(acts)), scale)


def _fused_wgrad_dot(
    act: Tensor,
    grad: Tensor,
    k: int,
    scale: Tensor | None,
    direction_tile: Callable[[int, int], Tensor],
    norms: bool,
    column: bool = False,
) -> tuple[Tensor, Tensor]:
    """The weight gradient's own product, sample by sample, and the dots while a tile is in cache.

    direction_tile(lo, hi) gives rows lo:hi of the K directions, (K, hi - lo, Din). Every sample
    has its own accumulator: with one running sum and differences of ⟨sum, D⟩, a sample's dot
    would carry the rounding error of the largest sample before it. `norms` adds the row ‖G_i‖² to
    the dots, `column` the column ‖D_k‖².
    """
    n, _, d_in = act.shape
    d_out = grad.shape[2]
    weight_grad = act.new_empty(d_out, d_in) if n else act.new_zeros(d_out, d_in)
    dots = act.new_zeros(k + norms, n + column)
    rows = max(1, min(d_out, _TILE_ELEMENTS // max(1, k * d_in)))
    buffer = act.new_empty(rows, d_in)
    for lo in range(0, d_out, rows):
        hi = min(lo + rows, d_out)
        directions = direction_tile(lo, hi)
        direction = directions.reshape(k, -1)
        if column:
            dots[:k, n] += squares(directions)
        tile = weight_grad[lo:hi]
        for i in range(n):
            # The first sample's gradient is where the sum begins: no zeros to write and add to.
            sample = buffer[: hi - lo] if i else tile
            torch.mm(grad[i, :, lo:hi].t(), act[i], out=sample)
            # dot uses every thread, mv with a single row only one.
            flat = sample.view(-1)
            dots[:k, i] += torch.dot(direction[0], flat) if k == 1 else torch.mv(direction, flat)
            if norms:
                dots[k, i] += squares(sample[None])[0]
            if i:
                tile.add_(sample)
        _scaled_(tile, scale)
    return weight_grad, dots


def linear_wgrad_dot(
    direction: Tensor, act: Tensor, grad: Tensor, scale: Tensor | None, norms: bool = False
) -> tuple[Tensor, Tensor]:
    """Weight gradient and dots, by whichever of fused and direction costs less."""
    direction = _accumulated(direction)
    k, t, elements = direction.shape[0], act.shape[1], len(act) * act.shape[2] * grad.shape[2]
    if not _fused_is_cheaper(act, elements, k * t * elements):
        dots = linear_direction_dot(direction, act, grad, per_token=False)
        if norms:
            dots = bordered(dots, linear_sample_dot(act, grad, act, grad))
        return _weight_grad(act, grad, scale), dots
    if cpu_kernels.available(act):
        weight_grad = _empty_weight_grad(act, grad)
        dots = cpu_kernels.linear_wgrad_dot(
            weight_grad, direction, [], act, grad, scale, False, norms
        )
        return weight_grad, dots
    act, grad = _accumulated(act), _accumulated(grad)
    return _fused_wgrad_dot(act, grad, k, scale, lambda lo, hi: direction[:, lo:hi], norms)


def apart_from(buffer: Tensor, x: Tensor) -> Tensor:
    """x, or a copy of it if it may lie where results go while x is still read."""
    shared = x.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    return x.clone() if shared else x


def linear_wgrad_dot_into(
    weight_grad: Tensor,
    bias_grads: Tensor | None,
    direction: Tensor,
    act: Tensor,
    grad: Tensor,
    scale: Tensor | None,
    accumulate: bool,
    norms: bool = False,
) -> Tensor:
    """`linear_wgrad_dot` into (or added to) weight_grad, (Dout, Din), in its own dtype, and every
    sample's unscaled bias gradient Σ_t b into bias_grads, (N, Dout). Returns the dots."""
    direction, act, grad = (apart_from(weight_grad, x) for x in (direction, act, grad))
    elements = len(act) * weight_grad.numel()
    fused = _fused_is_cheaper(act, elements, direction.shape[0] * act.shape[1] * elements)
    in_place = weight_grad.dtype == torch.float32 and weight_grad.is_contiguous()
    if fused and in_place and cpu_kernels.available(act):
        dots = cpu_kernels.linear_wgrad_dot(
            weight_grad, _accumulated(direction), [], act, grad, scale, accumulate, norms
        )
    else:
        total, dots = linear_wgrad_dot(direction, act, grad, scale, norms)
        if accumulate:
            weight_grad.add_(total)
        else:
            weight_grad.copy_(total)
    if bias_grads is not None:
        bias_grads.copy_(_accumulated(grad).sum(1))
    return dots


def _joint_gram_dots(act: Tensor, grad: Tensor, val_rows: list[int], norms: bool) -> Tensor:
    n = act.shape[0] - sum(val_rows)
    act, val_act, grad, val_grad = act[:n], act[n:], grad[:n], grad[n:]
    dots = _sum_by_group(linear_gram_dot(val_act, val_grad, act, grad, pairwise=True), val_rows)
    if not norms:
        return dots
    groups = zip(torch.split(val_act, val_rows), torch.split(val_grad, val_rows), strict=True)
    column = [linear_gram_dot(a, b, a, b, pairwise=False).sum() for a, b in groups]
    return bordered(dots, linear_sample_dot(act, grad, act, grad), torch.stack(column))


def linear_joint_wgrad_dot(
    act: Tensor, grad: Tensor, val_rows: list[int], scale: Tensor | None, norms: bool = False
) -> tuple[Tensor, Tensor]:
    """The same with directions from the val rows at the end, by fused or gram.

    Neither holds a whole direction: the fused route makes the tile that it is about to use.
    """
    n, t = act.shape[0] - sum(val_rows), act.shape[1]
    d_in, d_out = act.shape[2], grad.shape[2]
    gram_macs = n * t * sum(val_rows) * t * (d_in + d_out)
    if not _fused_is_cheaper(act, n * d_in * d_out, gram_macs):
        dots = _joint_gram_dots(act, grad, val_rows, norms)
        return _weight_grad(act[:n], grad[:n], scale), dots
    if cpu_kernels.available(act):
        weight_grad = _empty_weight_grad(act, grad)
        dots = cpu_kernels.linear_wgrad_dot(
            weight_grad, None, val_rows, act, grad, scale, False, norms
        )
        return weight_grad, dots
    act, grad = _accumulated(act), _accumulated(grad)
    val_acts = [_tokens(x) for x in torch.split(act[n:], val_rows)]
    val_grads = [_tokens(x) for x in torch.split(grad[n:], val_rows)]

    def direction_tile(lo: int, hi: int) -> Tensor:
        return torch.stack([b[:, lo:hi].t() @ a for a, b in zip(val_acts, val_grads, strict=True)])

    return _fused_wgrad_dot(act[:n], grad[:n], len(val_rows), scale, direction_tile, norms, norms)


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """The labels' shape and dtype; their values, see below."""
    rows, vocab = logits.shape
    if labels.shape != (rows,):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; expected ({rows},), one a row of the"
            f" logits, {(rows, vocab)}"
        )
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"labels has dtype {labels.dtype}; expected integers")


def cross_entropy_grad(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> Tensor:
    """Losses (R,); the logits become their gradients, a few rows at a time in the cache."""
    check_labels(logits, labels)
    rows, vocab = logits.shape
    labels = labels.long()  # also for ignore_index, which a narrower type may not hold
    used = labels != ignore_index
    labels = labels.masked_fill(~used, 0)
    if not logits.is_cuda:  # where the check would wait for the device, and torch's functions trap
        wrong = (labels < 0) | (labels >= vocab)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise IndexError(
                f"labels[{row}] is {int(labels[row])}, outside the vocabulary of {vocab}; the label"
                f" to be ignored is {ignore_index}"
            )
    # Rows that share memory, as expanded ones do, are refused where the gradient is copied to them.
    apart = rows == 1 or logits.stride(0) >= vocab
    if cpu_kernels.available(logits) and logits.stride(1) == 1 and apart and logits.numel() > 0:
        labels = labels.masked_fill_(~used, -1)
        return cpu_kernels.cross_entropy_grad(logits, labels, -1, label_smoothing, z_loss)
    losses = _accumulated(logits.new_empty(rows))
    block = max(1, _GRAM_ELEMENTS // max(1, vocab))
    for lo in range(0, rows, block):
        x, at = logits[lo : lo + block], labels[lo : lo + block, None]
        grad = _accumulated(x)
        lse = torch.logsumexp(grad, 1, keepdim=True)
        loss = lse - (1 - label_smoothing) * grad.gather(1, at) + z_loss * lse.square()
        if label_smoothing:  # 0 times a masked logit's -inf would be NaN
            loss -= label_smoothing * grad.mean(1, keepdim=True)
        grad = (grad - lse).exp_().mul_(1 + 2 * z_loss * lse).sub_(label_smoothing / vocab)
        grad.scatter_add_(1, at, grad.new_full(at.shape, label_smoothing - 1))
        keep = used[lo : lo + block, None]
        losses[lo : lo + block] = loss.masked_fill_(~keep, 0)[:, 0]
        x.copy_(grad.masked_fill_(~keep, 0))
    return losses


# The embedding ops below serve GPUs where the extension was built without CUDA (ops.py); on a CPU
# the extension's own do.


def _embedding_weight_grad(
    ids: Tensor, grad: Tensor, num_embeddings: int, padding_idx: int, scale: Tensor | None
) -> Tensor:
    weight_grad = torch.ops.aten.embedding_dense_backward(
        _accumulated(grad), ids, num_embeddings, padding_idx, False
    )
    return _scaled_(weight_grad, scale)


def _compact_direction(
    val_ids: Tensor, val_grad: Tensor, val_rows: list[int], num_embeddings: int, padding_idx: int
) -> tuple[Tensor, Tensor]:
    """The val rows' gradient of the table, (K, U, d), on the U ids that occur there, and the slot
    of every id among them, (num_embeddings,), -1 where it does not occur."""
    unique, inverse = torch.unique(val_ids, return_inverse=True)
    slots = val_ids.new_full((num_embeddings,), -1, dtype=torch.long)
    slots[unique.long()] = torch.arange(unique.numel(), device=val_ids.device)
    if padding_idx >= 0:
        slots[padding_idx] = -1
    table = _accumulated(val_grad.new_zeros(len(val_rows), unique.numel(), val_grad.shape[2]))
    groups = zip(torch.split(inverse, val_rows), torch.split(val_grad, val_rows), strict=True)
    for k, (rows, grads) in enumerate(groups):
        table[k].index_add_(0, rows.flatten(), _accumulated(_tokens(grads)))
    return table, slots


def _compact_dots(table: Tensor, slots: Tensor, ids: Tensor, grad: Tensor) -> Tensor:
    """Σ_t table[slot(id_it)] · b_it over the tokens whose id has a slot, (K, N)."""
    slot = slots[ids.long()]
    sample, token = (slot >= 0).nonzero(as_tuple=True)
    hits, rows = _accumulated(grad[sample, token]), slot[sample, token]
    dots = table.new_zeros(table.shape[0], ids.shape[0])
    for k in range(table.shape[0]):
        dots[k].index_add_(0, sample, (table[k, rows] * hits).sum(1))
    return dots


def embedding_ghost_dot(
    val_ids: Tensor,
    val_grad: Tensor,
    train_ids: Tensor,
    train_grad: Tensor,
    num_embeddings: int,
    padding_idx: int,
) -> Tensor:
    """⟨Σ_v G_v, G_i⟩ on the ids of the val batch only; nothing of the table's size is written."""
    rows = [val_ids.shape[0]]
    table, slots = _compact_direction(val_ids, val_grad, rows, num_embeddings, padding_idx)
    return _compact_dots(table, slots, train_ids, train_grad)[0]


def embedding_direction_dot(
    direction: Tensor, ids: Tensor, grad: Tensor, padding_idx: int, per_token: bool
) -> Tensor:
    """D_k[id_it] · b_it: a gather and a row dot a direction."""
    grad = _accumulated(grad)
    index = ids.long()
    out = torch.stack([(_accumulated(one[index]) * grad).sum(-1) for one in direction])
    if padding_idx >= 0:
        out.masked_fill_(ids == padding_idx, 0)
    return out if per_token else out.sum(-1)


def embedding_wgrad_dot(
    direction: Tensor, ids: Tensor, grad: Tensor, padding_idx: int, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The table's gradient by scatter, and the dots by gather."""
    dots = embedding_direction_dot(direction, ids, grad, padding_idx, per_token=False)
    return _embedding_weight_grad(ids, grad, direction.shape[1], padding_idx, scale), dots


def embedding_joint_wgrad_dot(
    ids: Tensor,
    grad: Tensor,
    val_rows: list[int],
    num_embeddings: int,
    padding_idx: int,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same with directions from the val rows at the end, held on their own ids only."""
    n = ids.shape[0] - sum(val_rows)
    table, slots = _compact_direction(ids[n:], grad[n:], val_rows, num_embeddings, padding_idx)
    dots = _compact_dots(table, slots, ids[:n], grad[:n])
    return _embedding_weight_grad(ids[:n], grad[:n], num_embeddings, padding_idx, scale), dots


def norm_sample_grads(
    x: Tensor, grad: Tensor, mean: Tensor | None = None, rstd: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Σ_t b⊙x̂ and Σ_t b, (N, d) each."""
    if cpu_kernels.norms_available(x) and grad.dtype == x.dtype:
        return cpu_kernels.norm_backward(x, grad, None, mean, rstd)[1:]
    grad, normed = _accumulated(grad), _accumulated(x)
    if mean is not None:
        normed = normed - mean[..., None]
    if rstd is not None:
        normed = normed * rstd[..., None] if mean is None else normed.mul_(rstd[..., None])
    return (grad * normed).sum(1), grad.sum(1)
