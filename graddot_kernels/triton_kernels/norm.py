"""Per-sample gradients of a norm's weight and bias: one pass over the tokens, memory-bound."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Tile, cdiv, norm_parts
from .launch import choose_tile, machine, on_device, options
from .tiles import load_block


@triton.jit
def norm_kernel(
    p_normed, p_grad, p_weight, p_bias, t, d, part, parts, tiles_d,
    normed_sn, normed_st, normed_sd, grad_sn, grad_st, grad_sd, out_sp,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One sample's sums over `part` tokens of BD columns, to row (part, sample) of the outputs."""
    i_program = tl.program_id(0)
    i_d, i_rest = i_program % tiles_d, i_program // tiles_d
    i_part, i_n = i_rest % parts, (i_rest // parts).to(tl.int64)
    o_d = i_d * BD + tl.arange(0, BD)
    p_normed += i_n * normed_sn
    p_grad += i_n * grad_sn
    last = tl.minimum(i_part * part + part, t)
    b_weight = tl.zeros((BT, BD), tl.float32)
    b_bias = tl.zeros((BT, BD), tl.float32)
    for i_t in range(i_part * part, last, BT):
        o_t = i_t + tl.arange(0, BT)
        b_grad = load_block(p_grad, o_t, o_d, last, d, grad_st, grad_sd).to(tl.float32)
        b_normed = load_block(p_normed, o_t, o_d, last, d, normed_st, normed_sd).to(tl.float32)
        b_weight += b_grad * b_normed
        b_bias += b_grad
    o_out = i_part.to(tl.int64) * out_sp + i_n * d + o_d
    tl.store(p_weight + o_out, tl.sum(b_weight, 0), mask=o_d < d)
    tl.store(p_bias + o_out, tl.sum(b_bias, 0), mask=o_d < d)


def norm_sample_grads(
    normed: Tensor, grad: Tensor, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """Σ_t b⊙x̂ and Σ_t b of every sample, (N, d) each in fp32."""
    n, t, d = grad.shape
    tile = tile or choose_tile("norm", grad)
    tiles_d = cdiv(d, tile.cols)
    parts = max(1, norm_parts(n * tiles_d, t, tile, machine(grad.device)[1]))
    part = cdiv(cdiv(t, parts), tile.rows) * tile.rows
    parts = max(1, cdiv(t, max(1, part)))
    sums = grad.new_empty((2, parts, n, d), dtype=torch.float32)
    if sums.numel() > 0:
        with on_device(grad):
            norm_kernel[(tiles_d * parts * n,)](
                normed, grad, sums[0], sums[1], t, d, part, parts, tiles_d,
                *normed.stride(), *grad.stride(), n * d,
                BT=tile.rows, BD=tile.cols, **options(tile),
            )  # fmt: skip
    weight, bias = sums[:, 0] if parts == 1 else sums.sum(1)
    return weight, bias
