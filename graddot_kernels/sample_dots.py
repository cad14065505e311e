"""Dots of every sample's gradient with another gradient of the same sample, itself among them.

In plain PyTorch, for any device: what squared norms need where no kernel has a sample's gradient in
registers, and for a weight that a sample uses twice. Nothing of a weight's size is written.
"""

import torch
from torch import Tensor

# Elements of one block of token-by-token products.
_BLOCK_ELEMENTS = 4 * 1024 * 1024


def _accumulated(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def squares(x: Tensor) -> Tensor:
    """‖x_k‖² of (K, R, C), by rows first: one long fp32 sum would lose digits."""
    return torch.linalg.vector_norm(x, dim=2).square().sum(1)


def bordered(dots: Tensor, row: Tensor, column: Tensor | None = None) -> Tensor:
    """(K, N) with one more row, (N,), and one more column, (K,), if there is one; the corner is 0."""
    dots = torch.cat([dots, row.to(dots.dtype)[None]])
    if column is None:
        return dots
    column = torch.nn.functional.pad(column.to(dots.dtype), (0, 1))
    return torch.cat([dots, column[:, None]], 1)


def linear_sample_dot(act: Tensor, grad: Tensor, other_act: Tensor, other_grad: Tensor) -> Tensor:
    """⟨G_i, G'_i⟩ = Σ_ts (a_it·a'_is)(b_it·b'_is), (N,), in blocks of samples.

    act (N, T, Din), grad (N, T, Dout), the others (N, S, ...); N·T·S·(Din + Dout) multiply-adds.
    """
    n, t, s = act.shape[0], act.shape[1], other_act.shape[1]
    block = max(1, _BLOCK_ELEMENTS // max(1, t * s))
    parts = [_accumulated(act.new_empty(0))]
    for i in range(0, n, block):
        acts, grads, others, other_grads = (
            _accumulated(x[i : i + block]) for x in (act, grad, other_act, other_grad)
        )
        products = torch.bmm(acts, others.transpose(1, 2))
        products *= torch.bmm(grads, other_grads.transpose(1, 2))
        parts.append(products.sum((1, 2)))
    return torch.cat(parts)


def linear_sample_rows(act: Tensor, grad: Tensor, ids: Tensor) -> Tensor:
    """Rows G_i[ids_i] of every sample's gradient, (N, U, Din), from act (N, T, Din), grad
    (N, T, Dout) and ids (N, U) below Dout."""
    index = ids.long()[:, None].expand(-1, grad.shape[1], -1)
    columns = _accumulated(grad.gather(2, index))
    return torch.bmm(columns.transpose(1, 2), _accumulated(act))


def _slots(ids: Tensor) -> Tensor:
    """For every token of (N, T) a number below N·T, the same for equal ids of one sample only."""
    n, t = ids.shape
    ordered, order = ids.sort(1)
    at = torch.arange(t, device=ids.device).expand(n, t)
    same = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    first = at.masked_fill(same, 0).cummax(1).values
    own = torch.empty_like(first).scatter_(1, order, first)
    return own + t * torch.arange(n, device=ids.device)[:, None]


def embedding_sample_dot(
    ids: Tensor, grad: Tensor, other_ids: Tensor, other_grad: Tensor, padding_idx: int | None
) -> Tensor:
    """⟨G_i, G'_i⟩ of a table, (N,), in O(N·(T + S)·d): a compact table of each sample's own ids.

    ids (N, T), grad (N, T, d), the others (N, S, ...); tokens of padding_idx have no gradient.
    """
    t = ids.shape[1]
    same = ids is other_ids and grad is other_grad
    joint = ids if same else torch.cat([ids, other_ids], 1)
    slots, size = _slots(joint), joint.numel()
    if padding_idx is not None:
        slots = slots.masked_fill(joint == padding_idx, size)

    def table(slots: Tensor, grad: Tensor) -> Tensor:  # repeats bitwise on a GPU, too
        rows = _accumulated(grad).flatten(0, 1)
        args = slots.reshape(-1), size + 1, size, False
        return torch.ops.aten.embedding_dense_backward(rows, *args)[:size]

    own = table(slots[:, :t], grad)
    other = own if same else table(slots[:, t:], other_grad)
    return (own * other).view(*joint.shape, grad.shape[2]).sum(2).sum(1)
