"""The rule of nn.MultiheadAttention, and so of PyTorch's transformer layers.

Its forward hands all weights to one function, where no layer's rule could score them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import GraddotError
from ..scored import Scored, any_layout


@any_layout
def multihead_attention(
    module: nn.Module,
    scored: Scored,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The layer's output and weights, as its own forward has them. is_causal is a hint about
    attn_mask, which comes with it."""
    assert isinstance(module, nn.MultiheadAttention)
    own = {id(x): _rows_first(module, scored, x) for x in (query, key, value)}
    q, k, v = _projected(module, scored, *(own[id(x)] for x in (query, key, value)))
    padding = None
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q.dtype)[:, None, None]
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask, q.dtype)
        mask = mask.unflatten(0, (scored.rows, -1)) if mask.dim() == 3 else mask
    if module.bias_k is not None and module.bias_v is not None:
        per_row = lambda p: scored.per_sample(p).to(q.dtype).flatten(0, 1)
        k, v = torch.cat([k, per_row(module.bias_k)], 1), torch.cat([v, per_row(module.bias_v)], 1)
        padding, mask = (None if x is None else F.pad(x, (0, 1)) for x in (padding, mask))
    if module.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        padding, mask = (None if x is None else F.pad(x, (0, 1)) for x in (padding, mask))
    if padding is not None:
        mask = padding if mask is None else mask + padding
    q, k, v = (x.unflatten(2, (module.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    dropout = module.dropout if module.training else 0.0
    weights = None
    if need_weights:
        scores = (q * module.head_dim**-0.5) @ k.mT
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        weights = F.dropout(weights, dropout)
        out = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    last = module.out_proj
    out = scored.linear_of_rows(out.transpose(1, 2).flatten(2), last.weight, last.bias)
    return out if module.batch_first else out.transpose(0, 1), weights


def _rows_first(module: nn.MultiheadAttention, scored: Scored, x: Tensor) -> Tensor:
    """(T, rows, E), or (rows, T, E) with batch_first, as (rows, T, E)."""
    layout = scored.step.layouts.get(scored.name)
    expected = "rows" if module.batch_first else "second"
    rows = x if module.batch_first else x.transpose(0, 1) if x.dim() > 1 else x
    known = layout in (expected, "unseen", None) or scored.rows == 1
    if x.dim() != 3 or rows.shape[0] != scored.rows or not known:
        shape = "(rows, T, E)" if module.batch_first else "(T, rows, E)"
        raise GraddotError(
            f"layer {scored.name} got an input of shape {tuple(x.shape)}; expected {shape} of"
            f" {scored.rows} rows (training rows, then validation rows), as batch_first says"
        )
    return rows


def _projected(
    module: nn.MultiheadAttention, scored: Scored, query: Tensor, key: Tensor, value: Tensor
) -> list[Tensor]:
    """Queries, keys and values, (rows, T, E) each."""
    weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    bias = module.in_proj_bias
    if module.in_proj_weight is None:
        parts = [
            scored.linear_of_rows(x, w) for x, w in zip((query, key, value), weights, strict=True)
        ]
        if bias is None:
            return parts
        biases = scored.per_sample(bias)[:, None].chunk(3, -1)
        return [x + b.to(x.dtype) for x, b in zip(parts, biases, strict=True)]
    # All that is attended from and to goes through the whole weight at once: some products that
    # are not needed, where it is not the same, but no cross terms between uses of one weight.
    inputs = {id(x): x for x in (query, key, value)}
    joint = scored.linear_of_rows(torch.cat([*inputs.values()], 1), module.in_proj_weight, bias)
    lengths = [x.shape[1] for x in inputs.values()]
    by_input = dict(zip(inputs, joint.split(lengths, 1), strict=True))
    return [by_input[id(x)].chunk(3, -1)[i] for i, x in enumerate((query, key, value))]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is True where there is no attention, as what is added to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -torch.inf)
