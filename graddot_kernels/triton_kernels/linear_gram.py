"""⟨G_v, G_i⟩ = Σ_st (a_vs·a_it)(b_vs·b_it) without a weight-sized tensor.

A program owns a tile of val tokens × train tokens. Both products are accumulated in registers,
multiplied and summed to one number a pair of samples; nothing of size T × S reaches memory, only
one number a tile, which a fixed-order sum adds up. Short samples share a tile: each takes the
next power of two of its tokens as rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Tile, cdiv, packed
from .launch import choose_tile, descriptor, fits_descriptor, flat_tokens, on_device, options
from .launch import precision as precision_of
from .tiles import tile_of

_BAND = 8


@triton.jit
def _rows_of(i_tile, tiles_t, B: tl.constexpr, P: tl.constexpr):
    """Samples and tokens of a tile's B rows when every sample takes P rows, [B] each."""
    o_row = tl.arange(0, B)
    return i_tile // tiles_t * (B // P) + o_row // P, i_tile % tiles_t * P + o_row % P


@triton.jit
def _load_rows(
    p_x, i_tile, tiles_t, i_d, n, t, d, stride_n, stride_t, stride_d,
    B: tl.constexpr, P: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[B, BK] rows of x (N, T, D), zero outside; a descriptor (then P == B) if TMA."""
    if TMA:
        b_x = tl.reshape(p_x.load([i_tile // tiles_t, i_tile % tiles_t * P, i_d]), (B, BK))
    else:
        o_n, o_t = _rows_of(i_tile, tiles_t, B, P)
        o_d = i_d + tl.arange(0, BK)
        p_row = p_x + o_n.to(tl.int64) * stride_n + o_t.to(tl.int64) * stride_t
        p_block = p_row[:, None] + o_d[None, :].to(tl.int64) * stride_d
        m_row = (o_n < n) & (o_t < t)
        b_x = tl.load(p_block, mask=m_row[:, None] & (o_d < d)[None, :], other=0.0)
    return b_x


@triton.jit
def _product(
    p_v, p_t, i_s, i_t, tiles_s, tiles_t, v, s, n, t, d,
    v_sn, v_st, v_sd, t_sn, t_st, t_sd,
    BS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, PS: tl.constexpr, PT: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Val rows times train rows of one side of the layer, [BS, BT]."""
    b_product = tl.zeros((BS, BT), tl.float32)
    for i_d in range(0, d, BK):
        b_v = _load_rows(p_v, i_s, tiles_s, i_d, v, s, d, v_sn, v_st, v_sd, BS, PS, BK, TMA)
        b_t = _load_rows(p_t, i_t, tiles_t, i_d, n, t, d, t_sn, t_st, t_sd, BT, PT, BK, TMA)
        b_product = tl.dot(b_v, tl.trans(b_t), b_product, input_precision=PRECISION)
    return b_product


@triton.jit
def gram_kernel(
    p_val_act, p_val_grad, p_act, p_grad, p_parts, v, s, n, t, d_in, d_out,
    va_sn, va_st, va_sd, vg_sn, vg_st, vg_sd, a_sn, a_st, a_sd, g_sn, g_st, g_sd,
    BS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, PS: tl.constexpr, PT: tl.constexpr,
    BAND: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile's pair sums, to part (tile of s, tile of t) of p_parts (parts, V, N)."""
    tiles_s, tiles_t = tl.cdiv(s, PS), tl.cdiv(t, PT)
    all_s, all_t = tl.cdiv(v, BS // PS) * tiles_s, tl.cdiv(n, BT // PT) * tiles_t
    i_s, i_t = tile_of(tl.program_id(0), all_s, all_t, BAND)
    b_acts = _product(
        p_val_act, p_act, i_s, i_t, tiles_s, tiles_t, v, s, n, t, d_in,
        va_sn, va_st, va_sd, a_sn, a_st, a_sd, BS, BT, BK, PS, PT, TMA, PRECISION,
    )  # fmt: skip
    b_grads = _product(
        p_val_grad, p_grad, i_s, i_t, tiles_s, tiles_t, v, s, n, t, d_out,
        vg_sn, vg_st, vg_sd, g_sn, g_st, g_sd, BS, BT, BK, PS, PT, TMA, PRECISION,
    )  # fmt: skip
    i_part = (i_s % tiles_s * tiles_t + i_t % tiles_t).to(tl.int64)
    p_parts += i_part * v * n
    if PS == BS and PT == BT:
        i_pair = (i_s // tiles_s).to(tl.int64) * n + i_t // tiles_t
        tl.store(p_parts + i_pair, tl.sum(b_acts * b_grads))
    else:
        b_rows = tl.sum(tl.reshape(b_acts * b_grads, (BS, BT // PT, PT)), 2)  # [BS, BT / PT]
        b_pairs = tl.sum(tl.reshape(b_rows, (BS // PS, PS, BT // PT)), 1)  # [BS / PS, BT / PT]
        o_v = i_s // tiles_s * (BS // PS) + tl.arange(0, BS // PS)
        o_n = i_t // tiles_t * (BT // PT) + tl.arange(0, BT // PT)
        p_pairs = p_parts + o_v[:, None].to(tl.int64) * n + o_n[None, :]
        tl.store(p_pairs, b_pairs, mask=(o_v < v)[:, None] & (o_n < n)[None, :])


def linear_gram_dot(
    val_act: Tensor,
    val_grad: Tensor,
    train_act: Tensor,
    train_grad: Tensor,
    pairwise: bool,
    tile: Tile | None = None,
) -> Tensor:
    """⟨G_v, G_i⟩, (V, N), or its sum over v, (N,), in fp32."""
    flat_act, flat_grad = flat_tokens(val_act), flat_tokens(val_grad)
    if not pairwise and flat_act is not None and flat_grad is not None:
        # One val "sample" of all tokens: no row of a tile is lost to the ends of samples.
        val_act, val_grad = flat_act, flat_grad
    v, s, d_in = val_act.shape
    n, t, d_out = train_grad.shape
    if 0 in (v, s, n, t, d_in, d_out):
        pairs = train_act.new_zeros((v, n), dtype=torch.float32)
        return pairs if pairwise else pairs.sum(0)
    tile = tile or choose_tile("gram", train_act)
    rows_s, rows_t = packed(s, tile.rows), packed(t, tile.cols)
    tiles_s, tiles_t = cdiv(s, rows_s), cdiv(t, rows_t)
    programs = cdiv(v, tile.rows // rows_s) * tiles_s * cdiv(n, tile.cols // rows_t) * tiles_t
    parts = train_act.new_empty((tiles_s * tiles_t, v, n), dtype=torch.float32)
    inputs = (val_act, val_grad, train_act, train_grad)
    whole = rows_s == tile.rows and rows_t == tile.cols
    tma = tile.tma and whole and all(fits_descriptor(x) for x in inputs)
    blocks = (tile.rows, tile.rows, tile.cols, tile.cols)
    with on_device(train_act):
        gram_kernel[(programs,)](
            *(
                [descriptor(x, rows, tile.depth) for x, rows in zip(inputs, blocks, strict=True)]
                if tma
                else inputs
            ),
            parts, v, s, n, t, d_in, d_out,
            *val_act.stride(), *val_grad.stride(), *train_act.stride(), *train_grad.stride(),
            BS=tile.rows, BT=tile.cols, BK=tile.depth, PS=rows_s, PT=rows_t,
            BAND=_BAND, TMA=tma, PRECISION=precision_of(train_act), **options(tile),
        )  # fmt: skip
    pairs = parts[0] if len(parts) == 1 else parts.sum(0)
    return pairs if pairwise else pairs.sum(0)
