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
    p_x, p_grad, p_mean, p_rstd, p_weight, p_bias, t, d, part, parts, tiles_d,
    x_sn, x_st, x_sd, grad_sn, grad_st, grad_sd, out_sp,
    BT: tl.constexpr, BD: tl.constexpr, MEAN: tl.constexpr, RSTD: tl.constexpr,
):  # fmt: skip
    """One sample's sums over `part` tokens of BD columns, to row (part, sample) of the outputs;
    p_mean and p_rstd (N, T)."""
    i_program = tl.program_id(0)
    i_d, i_rest = i_program % tiles_d, i_program // tiles_d
    i_part, i_n = i_rest % parts, (i_rest // parts).to(tl.int64)
    o_d = i_d * BD + tl.arange(0, BD)
    p_x += i_n * x_sn
    p_grad += i_n * grad_sn
    last = tl.minimum(i_part * part + part, t)
    b_weight = tl.zeros((BT, BD), tl.float32)
    b_bias = tl.zeros((BT, BD), tl.float32)
    for i_t in range(i_part * part, last, BT):
        o_t = i_t + tl.arange(0, BT)
        b_grad = load_block(p_grad, o_t, o_d, last, d, grad_st, grad_sd).to(tl.float32)
        b_x = load_block(p_x, o_t, o_d, last, d, x_st, x_sd).to(tl.float32)
        if MEAN:  # beyond the last token the gradient is 0, and so is the product
            b_x -= tl.load(p_mean + i_n * t + o_t, mask=o_t < last, other=0.0)[:, None]
        if RSTD:
            b_x *= tl.load(p_rstd + i_n * t + o_t, mask=o_t < last, other=0.0)[:, None]
        b_weight += b_grad * b_x
        b_bias += b_grad
    o_out = i_part.to(tl.int64) * out_sp + i_n * d + o_d
    tl.store(p_weight + o_out, tl.sum(b_weight, 0), mask=o_d < d)
    tl.store(p_bias + o_out, tl.sum(b_bias, 0), mask=o_d < d)


def norm_sample_grads(
    x: Tensor,
    grad: Tensor,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Σ_t b⊙x̂ and Σ_t b of every sample, (N, d) each in fp32; x̂ = (x - mean) · rstd."""
    n, t, d = grad.shape
    tile = tile or choose_tile("norm", grad)
    tiles_d = cdiv(d, tile.cols)
    parts = max(1, norm_parts(n * tiles_d, t, tile, machine(grad.device)[1]))
    part = cdiv(cdiv(t, parts), tile.rows) * tile.rows
    parts = max(1, cdiv(t, max(1, part)))
    contiguous = lambda y: None if y is None else y.contiguous()
    sums = grad.new_empty((2, parts, n, d), dtype=torch.float32)
    if sums.numel() > 0:
        with on_device(grad):
            norm_kernel[(tiles_d * parts * n,)](
                x, grad, contiguous(mean), contiguous(rstd), sums[0], sums[1],
                t, d, part, parts, tiles_d, *x.stride(), *grad.stride(), n * d,
                BT=tile.rows, BD=tile.cols, MEAN=mean is not None, RSTD=rstd is not None,
                **options(tile),
            )  # fmt: skip
    weight, bias = sums[:, 0] if parts == 1 else sums.sum(1)
    return weight, bias
