"""The plain definition of every op: a few lines each, no tiling, no tricks.

Tests compare every fast form with these, in float64. They materialise per-sample gradients, so
they are for small shapes only. Shapes: act (N, T, Din), grad (N, T, Dout), ids (N, T),
direction (K, Dout, Din) or (K, num_embeddings, d); dots are (K, N) unless said otherwise.
"""

import torch
from torch import Tensor


def linear_sample_grads(act: Tensor, grad: Tensor) -> Tensor:
    """Per-sample weight gradients G_i = B_iᵀ A_i, (N, Dout, Din)."""
    return torch.einsum("nto,nti->noi", grad, act)


def linear_gram_dot(
    val_act: Tensor, val_grad: Tensor, train_act: Tensor, train_grad: Tensor, pairwise: bool
) -> Tensor:
    """⟨G_v, G_i⟩ for every pair, (V, N), or summed over v, (N,)."""
    val = linear_sample_grads(val_act, val_grad)
    train = linear_sample_grads(train_act, train_grad)
    pairs = torch.einsum("voi,noi->vn", val, train)
    return pairs if pairwise else pairs.sum(0)


def linear_direction_dot(direction: Tensor, act: Tensor, grad: Tensor, per_token: bool) -> Tensor:
    """b_itᵀ D_k a_it, (K, N, T), or summed over t, (K, N)."""
    tokens = torch.einsum("nto,koi,nti->knt", grad, direction, act)
    return tokens if per_token else tokens.sum(-1)


def linear_wgrad_dot(
    direction: Tensor, act: Tensor, grad: Tensor, scale: Tensor | None, norms: bool = False
) -> tuple[Tensor, Tensor]:
    """scale · Σ_i G_i, (Dout, Din), and ⟨D_k, G_i⟩, (K, N). The dots are not scaled.

    With `norms` they have one more row, ‖G_i‖².
    """
    grads = linear_sample_grads(act, grad)
    total = grads.sum(0)
    dots = torch.einsum("koi,noi->kn", direction, grads)
    if norms:
        dots = torch.cat([dots, grads.square().sum((1, 2))[None]])
    return (total if scale is None else total * scale), dots


def linear_joint_wgrad_dot(
    act: Tensor, grad: Tensor, val_rows: list[int], scale: Tensor | None, norms: bool = False
) -> tuple[Tensor, Tensor]:
    """`linear_wgrad_dot` of the training rows; D_k is the gradient of the k-th group of val rows.

    act and grad hold N training rows, then val_rows[0] rows of target 0, val_rows[1] of target 1...
    With `norms` the dots also have one more column, ‖D_k‖², and 0 in the corner.
    """
    groups = torch.split(linear_sample_grads(act, grad), [act.shape[0] - sum(val_rows), *val_rows])
    direction = torch.stack([g.sum(0) for g in groups[1:]])
    n = groups[0].shape[0]
    total, dots = linear_wgrad_dot(direction, act[:n], grad[:n], scale, norms)
    if norms:
        column = torch.cat([direction.square().sum((1, 2)), dots.new_zeros(1)])
        dots = torch.cat([dots, column[:, None]], 1)
    return total, dots


def embedding_sample_grads(
    ids: Tensor, grad: Tensor, num_embeddings: int, padding_idx: int | None
) -> Tensor:
    """Per-sample gradients of the embedding table, (N, num_embeddings, d)."""
    n, _, d = grad.shape
    out = grad.new_zeros(n, num_embeddings, d)
    out.scatter_add_(1, ids.long().unsqueeze(-1).expand(-1, -1, d), grad)
    if padding_idx is not None:
        out[:, padding_idx] = 0
    return out


def embedding_ghost_dot(
    val_ids: Tensor,
    val_grad: Tensor,
    train_ids: Tensor,
    train_grad: Tensor,
    num_embeddings: int,
    padding_idx: int | None,
) -> Tensor:
    """⟨Σ_v G_v, G_i⟩, (N,)."""
    val = embedding_sample_grads(val_ids, val_grad, num_embeddings, padding_idx).sum(0)
    train = embedding_sample_grads(train_ids, train_grad, num_embeddings, padding_idx)
    return (val * train).flatten(1).sum(1)


def embedding_direction_dot(
    direction: Tensor, ids: Tensor, grad: Tensor, padding_idx: int | None, per_token: bool
) -> Tensor:
    """D_k[id_it] · b_it, (K, N, T), or summed over t, (K, N). A padding id scores nothing."""
    tokens = torch.einsum("kntd,ntd->knt", direction[:, ids.long()], grad)
    if padding_idx is not None:
        tokens = tokens.masked_fill(ids == padding_idx, 0)
    return tokens if per_token else tokens.sum(-1)


def embedding_wgrad_dot(
    direction: Tensor, ids: Tensor, grad: Tensor, padding_idx: int | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """scale · Σ_i G_i, (num_embeddings, d), and ⟨D_k, G_i⟩, (K, N)."""
    grads = embedding_sample_grads(ids, grad, direction.shape[1], padding_idx)
    total = grads.sum(0)
    # sum() adds in pairs: a long table's rounding would show in an einsum, which adds in sequence.
    dots = torch.stack([(d * grads).flatten(1).sum(1) for d in direction])
    return (total if scale is None else total * scale), dots


def embedding_joint_wgrad_dot(
    ids: Tensor,
    grad: Tensor,
    val_rows: list[int],
    num_embeddings: int,
    padding_idx: int | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`embedding_wgrad_dot` of the training rows; D_k comes from the k-th group of val rows."""
    n = ids.shape[0] - sum(val_rows)
    grads = embedding_sample_grads(ids, grad, num_embeddings, padding_idx)
    groups = torch.split(grads, [n, *val_rows])
    direction = torch.stack([g.sum(0) for g in groups[1:]])
    return embedding_wgrad_dot(direction, ids[:n], grad[:n], padding_idx, scale)


def norm_sample_grads(
    x: Tensor, grad: Tensor, mean: Tensor | None = None, rstd: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Per-sample gradients of a norm's weight, Σ_t b⊙x̂, and bias, Σ_t b, each (N, d), where
    x̂ = (x - mean) · rstd with mean and rstd (N, T)."""
    normed = x if mean is None else x - mean[..., None]
    normed = normed if rstd is None else normed * rstd[..., None]
    return (grad * normed).sum(1), grad.sum(1)


def cross_entropy_grad(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Losses (R,) and their gradients (R, vocab), both 0 where the label is ignored.

    With lse = log Σ_j exp(x_j) and smoothing ε, a row's loss is
    lse - (1 - ε) x_label - ε/vocab Σ_j x_j + z_loss · lse².
    """
    x = logits.detach().clone().requires_grad_()
    with torch.enable_grad():
        losses = torch.nn.functional.cross_entropy(
            x, labels, None, None, ignore_index, None, "none", label_smoothing
        )
        losses = losses + z_loss * (torch.logsumexp(x, 1).square() * (labels != ignore_index))
        (grads,) = torch.autograd.grad(losses.sum(), x)
    return losses.detach(), grads
