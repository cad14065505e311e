"""b_itᵀ D_k a_it for every token: a matrix product whose result is multiplied with the other side
and summed over its columns while it is still in registers.

One side of the layer, x, is contracted with D; the other, y, meets the product in the epilogue.
The wider side is contracted: fewer column tiles, so fewer epilogues and partial sums. A partial
sum a token and column tile goes to memory, and a fixed-order sum over the tiles follows.

An fp32 direction beside 16-bit samples is two directions of 16 bits, whose sum it is to 2⁻¹⁶ of
every entry: the matrix units have no true fp32, and the ordinary ones a fraction of their rate.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Tile, cdiv
from .launch import choose_tile, on_device, options, precision
from .tiles import halves, load_block, tile_of

_BAND = 8
_EXPONENT = 0x7F800000  # of an fp32 number's bits
# Where a direction's largest entry comes to, or up to twice that: fp16 then reaches 2⁻³⁸ of it.
_LARGEST = 2.0**14


@triton.jit
def _row_dots(b_p, p_y, m_row, i_c, cols, stride_d, SLICES: tl.constexpr):
    """Σ over columns of b_p ⊙ y, [BM], reading y in column slices. p_y [BM] points at its rows."""
    BN: tl.constexpr = b_p.shape[1]
    if SLICES == 1:
        o_c = i_c + tl.arange(0, BN)
        p_block = p_y[:, None] + o_c[None, :].to(tl.int64) * stride_d
        b_y = tl.load(p_block, mask=m_row[:, None] & (o_c < cols)[None, :], other=0.0)
        b_dots = tl.sum(b_p * b_y.to(tl.float32), 1)
    else:
        b_left, b_right = halves(b_p)
        b_dots = _row_dots(b_left, p_y, m_row, i_c, cols, stride_d, SLICES // 2)
        b_dots += _row_dots(b_right, p_y, m_row, i_c + BN // 2, cols, stride_d, SLICES // 2)
    return b_dots


@triton.jit
def direction_kernel(
    p_x, p_y, p_direction, p_parts, rows, t, d_x, d_y,
    x_sn, x_st, x_sd, y_sn, y_st, y_sd, dir_sk, dir_sy, dir_sx,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
    SLICES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program k after k, of each the tiles of tokens × columns of y: x (rows, d_x), y (rows, d_y),
    D (K, d_y, d_x). In one dimension, for a grid has 65535 in its second."""
    tiles_m, tiles_n = tl.cdiv(rows, BM), tl.cdiv(d_y, BN)
    i_m, i_n = tile_of(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, BAND)
    i_k = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    o_row = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    m_row = o_row < rows
    o_sample, o_token = (o_row // t).to(tl.int64), (o_row % t).to(tl.int64)
    p_x_rows = p_x + o_sample * x_sn + o_token * x_st
    p_direction += i_k * dir_sk
    b_p = tl.zeros((BM, BN), tl.float32)
    for i_x in range(0, d_x, BK):
        o_x = i_x + tl.arange(0, BK)
        p_block = p_x_rows[:, None] + o_x[None, :].to(tl.int64) * x_sd
        b_x = tl.load(p_block, mask=m_row[:, None] & (o_x < d_x)[None, :], other=0.0)
        b_d = load_block(p_direction, o_x, o_n, d_x, d_y, dir_sx, dir_sy)  # [BK, BN]
        b_p = tl.dot(b_x, b_d, b_p, input_precision=PRECISION)
    p_y_rows = p_y + o_sample * y_sn + o_token * y_st
    b_dots = _row_dots(b_p, p_y_rows, m_row, i_n * BN, d_y, y_sd, SLICES)
    p_part = p_parts + (i_k * tiles_n + i_n) * rows + o_row
    tl.store(p_part, b_dots, mask=m_row)


def _is_split(direction: Tensor, act: Tensor) -> bool:
    return direction.dtype != act.dtype and act.itemsize == 2 and direction.numel() > 0


def direction_products(direction: Tensor, act: Tensor) -> int:
    """The products with samples that the directions take: two each of fp32 beside 16 bits."""
    return direction.shape[0] * (2 if _is_split(direction, act) else 1)


def split_direction(direction: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp32 D_k as factor_k · (H_k + L_k) in a 16-bit dtype: H and then L, (2K, Dout, Din), and the
    factors, (K,). Off by at most 2⁻¹⁶ of every entry in bf16, 2⁻²² in fp16."""
    largest = torch.linalg.vector_norm(direction, torch.inf, (1, 2))
    # Its power of two, from its bits: exact, and the host waits for nothing. Zero and subnormal
    # numbers take the smallest normal one; what is not finite becomes inf, and its dots NaN.
    power = (largest.view(torch.int32) & _EXPONENT).view(torch.float32)
    power = power.clamp(min=torch.finfo(torch.float32).tiny)
    scaled = direction / power[:, None, None] * _LARGEST
    pieces = direction.new_empty((2, *direction.shape), dtype=dtype)
    pieces[0] = scaled
    torch.sub(scaled, pieces[0], out=pieces[1])
    return pieces.flatten(0, 1), power / _LARGEST


def linear_direction_dot(
    direction: Tensor, act: Tensor, grad: Tensor, per_token: bool, tile: Tile | None = None
) -> Tensor:
    """Σ_t b_itᵀ D_k a_it, (K, N), or every token's term, (K, N, T), in fp32."""
    n, t, d_in = act.shape
    factor = None
    if _is_split(direction, act):
        direction, factor = split_direction(direction.float(), act.dtype)
    direction = direction.to(act.dtype)  # else as it is, or the wider of the two
    k, d_out, _ = direction.shape
    x, y = act, grad
    if d_out > d_in:
        x, y, direction = grad, act, direction.transpose(1, 2)
    tile = tile or choose_tile("direction", act)
    tiles_n, rows = cdiv(y.shape[2], tile.cols), n * t
    parts = act.new_empty((k, tiles_n, n, t), dtype=torch.float32)
    if parts.numel() > 0:
        with on_device(act):
            direction_kernel[(cdiv(rows, tile.rows) * tiles_n * k,)](
                x, y, direction, parts, rows, t, x.shape[2], y.shape[2],
                *x.stride(), *y.stride(), *direction.stride(),
                BM=tile.rows, BN=tile.cols, BK=tile.depth, BAND=_BAND,
                SLICES=tile.slices, PRECISION=precision(act), **options(tile),
            )  # fmt: skip
    dots = parts.sum(1) if per_token else parts.sum((1, 3))
    if factor is None:
        return dots
    high, low = dots.unflatten(0, (2, -1))
    return (high + low) * factor.view(-1, *[1] * (dots.dim() - 1))
