"""The weight gradient's own matrix product, sample by sample, and every sample's dots with it.

A program owns one [BO, BI] tile of the weight gradient and a run of samples. It walks their
tokens in one flat loop, so that the loads of the next sample are in flight while a sample ends.
At a sample's last tokens its accumulator is multiplied with the direction's tile, reduced to one
number, and added to the running total. No difference of running sums is taken: a sample's dot
carries the rounding of its own gradient only, however large its neighbours are.

No float atomics: every number has one writer, and sums over programs run in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sample_dots import bordered, linear_sample_dot, squares
from ..torch_impl import apart_from, mm_fp32, products_fp32
from . import config
from .config import Tile, cdiv
from .launch import (
    aligned_rows,
    aligned_width,
    choose_tile,
    descriptor,
    fits_descriptor,
    machine,
    on_device,
    options,
    precision,
)
from .linear_direction import direction_products, linear_direction_dot
from .linear_gram import linear_gram_dot
from .tiles import halves, load_block, tile_of

_BAND = 8


@triton.jit
def _tile_dot(
    b_sample, p_direction, i_o, i_i, d_out, d_in, stride_o, stride_i, SLICES: tl.constexpr
):
    """⟨D's tile, a sample's tile⟩, reading D in column slices: whole, it would spill."""
    BO: tl.constexpr = b_sample.shape[0]
    BI: tl.constexpr = b_sample.shape[1]
    if SLICES == 1:
        o_o, o_i = i_o + tl.arange(0, BO), i_i + tl.arange(0, BI)
        b_d = load_block(p_direction, o_o, o_i, d_out, d_in, stride_o, stride_i)
        dot = tl.sum(b_sample * b_d.to(tl.float32))
    else:
        b_l, b_r = halves(b_sample)
        i_r = i_i + BI // 2
        dot = _tile_dot(b_l, p_direction, i_o, i_i, d_out, d_in, stride_o, stride_i, SLICES // 2)
        dot += _tile_dot(b_r, p_direction, i_o, i_r, d_out, d_in, stride_o, stride_i, SLICES // 2)
    return dot


@triton.jit
def wgrad_kernel(
    p_grad, p_act, p_direction, p_out, p_dots, p_scale, n, t, d_out, d_grad, d_in, k,
    samples, grad_sn, grad_st, grad_sd, act_sn, act_st, act_sd, dir_sk, dir_so, dir_si,
    out_sg, out_so, out_si,
    BO: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr, BAND: tl.constexpr,
    SLICES: tl.constexpr, RESIDENT: tl.constexpr, SCALE: tl.constexpr, ACCUMULATE: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, NORMS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Program (tile of the weight gradient, group of `samples` samples).

    p_out (groups, Dout, Din); p_dots (tiles, K, N), with NORMS one more row for ‖G_i‖².
    RESIDENT: the only direction's tile stays in registers. PADDED: of p_grad's d_grad columns
    those from Dout on hold anything at all.

    The loaded tokens have one use, the product: with a second one, as to sum up the bias's
    gradient, Triton 3.6 and 3.9 make sm_90 wait for every single instruction of the product, or
    load the next tokens over those still being multiplied. `make aot` refuses both.
    """
    i_tile, i_group = tl.program_id(0), tl.program_id(1)
    i_o, i_i = tile_of(i_tile, tl.cdiv(d_out, BO), tl.cdiv(d_in, BI), BAND)
    i_o, i_i = i_o * BO, i_i * BI
    o_o, o_i = i_o + tl.arange(0, BO), i_i + tl.arange(0, BI)
    p_dots += i_tile.to(tl.int64) * (k + NORMS) * n
    i_n, i_t = i_group * samples, 0
    tiles_t = tl.cdiv(t, BT)
    steps = tl.minimum(samples, n - i_n) * tiles_t
    b_total = tl.zeros((BO, BI), tl.float32)
    b_sample = tl.zeros((BO, BI), tl.float32)
    if RESIDENT:
        b_d = load_block(p_direction, o_o, o_i, d_out, d_in, dir_so, dir_si)
    if not TMA:
        # Pointers that move on cost the loop two additions a load; computed anew from sample and
        # token they were two fifths of its instructions, an integer division among them.
        o_t = tl.arange(0, BT)
        p_g = p_grad + i_n.to(tl.int64) * grad_sn
        p_a = p_act + i_n.to(tl.int64) * act_sn
        o_g = o_o[:, None].to(tl.int64) * grad_sd + o_t[None, :].to(tl.int64) * grad_st
        o_a = o_t[:, None].to(tl.int64) * act_st + o_i[None, :].to(tl.int64) * act_sd
        m_o, m_i = (o_o < d_grad)[:, None], (o_i < d_in)[None, :]
        depth = tl.full((), BT, tl.int64)  # a stride of 1 has no dtype
        g_step, a_step = depth * grad_st, depth * act_st
        g_last, a_last = grad_sn - (tiles_t - 1) * g_step, act_sn - (tiles_t - 1) * a_step
    for _ in range(steps):
        is_last = i_t + BT >= t
        if TMA:
            b_grad = tl.trans(tl.reshape(p_grad.load([i_n, i_t, i_o]), (BT, BO)))
            b_act = tl.reshape(p_act.load([i_n, i_t, i_i]), (BT, BI))
        else:
            m_t = o_t < t - i_t
            b_grad = tl.load(p_g + o_g, mask=m_t[None, :] & m_o, other=0.0)
            b_act = tl.load(p_a + o_a, mask=m_t[:, None] & m_i, other=0.0)
            p_g += tl.where(is_last, g_last, g_step)
            p_a += tl.where(is_last, a_last, a_step)
        b_sample = tl.dot(b_grad, b_act, b_sample, input_precision=PRECISION)
        if is_last:
            if PADDED:
                b_sample = tl.where((o_o < d_out)[:, None], b_sample, 0.0)
            if RESIDENT:
                tl.store(p_dots + i_n, tl.sum(b_sample * b_d.to(tl.float32)))
                if NORMS:
                    tl.store(p_dots + n + i_n, tl.sum(b_sample * b_sample))
            else:
                p_d, p_dot = p_direction, p_dots + i_n
                for _ in range(k):
                    dot = _tile_dot(b_sample, p_d, i_o, i_i, d_out, d_in, dir_so, dir_si, SLICES)
                    tl.store(p_dot, dot)
                    p_d += dir_sk
                    p_dot += n
                if NORMS:
                    tl.store(p_dot, tl.sum(b_sample * b_sample))
            b_total += b_sample
            b_sample = tl.zeros((BO, BI), tl.float32)
        i_n += is_last.to(tl.int32)
        i_t = tl.where(is_last, 0, i_t + BT)
    # i_t is 0 again, which the compiler does not know: so it computes these now, and does not keep
    # them in registers, or spill them, all through the loop.
    o_o, o_i = i_o + i_t + tl.arange(0, BO), i_i + i_t + tl.arange(0, BI)
    p_tile = p_out + i_group.to(tl.int64) * out_sg + o_o[:, None].to(tl.int64) * out_so
    p_tile += o_i[None, :].to(tl.int64) * out_si
    _write(p_tile, b_total, p_scale, (o_o < d_out)[:, None] & (o_i < d_in)[None, :],
           SCALE, ACCUMULATE)  # fmt: skip


@triton.jit
def _write(p_tile, b_total, p_scale, m_tile, SCALE: tl.constexpr, ACCUMULATE: tl.constexpr):
    """scale · total, added to what is there if asked, rounded once to the buffer's dtype."""
    if SCALE:
        b_total *= tl.load(p_scale).to(tl.float32)  # the engine's is fp64
    if ACCUMULATE:
        b_total += tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
    tl.store(p_tile, b_total.to(p_tile.dtype.element_ty), mask=m_tile)


@triton.jit
def combine_kernel(
    p_parts, p_out, p_scale, groups, d_out, d_in, parts_sg, parts_so, out_so, out_si,
    BO: tl.constexpr, BI: tl.constexpr, SCALE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Sum of the groups' partial weight gradients (groups, Dout, Din), in their order."""
    tiles_i = tl.cdiv(d_in, BI)
    o_o = tl.program_id(0) // tiles_i * BO + tl.arange(0, BO)
    o_i = tl.program_id(0) % tiles_i * BI + tl.arange(0, BI)
    b_total = tl.zeros((BO, BI), tl.float32)
    for _ in range(groups):
        b_total += load_block(p_parts, o_o, o_i, d_out, d_in, parts_so, 1)
        p_parts += parts_sg
    p_tile = p_out + o_o[:, None].to(tl.int64) * out_so + o_i[None, :].to(tl.int64) * out_si
    _write(p_tile, b_total, p_scale, (o_o < d_out)[:, None] & (o_i < d_in)[None, :],
           SCALE, ACCUMULATE)  # fmt: skip


def fused_wgrad_dot(
    weight_grad: Tensor,
    direction: Tensor,
    act: Tensor,
    grad: Tensor,
    scale: Tensor | None,
    accumulate: bool,
    tile: Tile,
    samples: int | None = None,
    norms: bool = False,
) -> Tensor:
    """The fused route into a given buffer; returns the dots, (K, N), or (K + 1, N) with `norms`.
    `samples` a program walks."""
    n, t, d_in = act.shape
    k, d_out, _ = direction.shape
    tiles = cdiv(d_out, tile.rows) * cdiv(d_in, tile.cols)
    samples = samples or config.wgrad_samples(tiles, n, t, tile, machine(act.device)[1])
    groups = cdiv(n, samples)
    split = groups > 1
    dots = act.new_empty((tiles, k + norms, n), dtype=torch.float32)
    out = weight_grad
    if split:
        out = act.new_empty((groups, d_out, d_in), dtype=torch.float32)
    grad = aligned_rows(grad)
    tma = tile.tma and fits_descriptor(act) and fits_descriptor(grad)
    d_grad = d_out if tma else aligned_width(grad)
    with on_device(act):
        wgrad_kernel[(tiles, groups)](
            descriptor(grad, tile.depth, tile.rows) if tma else grad,
            descriptor(act, tile.depth, tile.cols) if tma else act,
            direction, out, dots, scale, n, t, d_out, d_grad, d_in, k, samples,
            *grad.stride(), *act.stride(), *direction.stride(),
            out.stride(0) if split else 0, *out.stride()[-2:],
            BO=tile.rows, BI=tile.cols, BT=tile.depth, BAND=_BAND, SLICES=tile.slices,
            RESIDENT=k == 1 and direction.itemsize <= tile.resident,
            SCALE=scale is not None and not split, ACCUMULATE=accumulate and not split, TMA=tma,
            PRECISION=precision(act), NORMS=norms, PADDED=d_grad > d_out, **options(tile),
        )  # fmt: skip
        if split:
            combine_kernel[(cdiv(d_out, 32) * cdiv(d_in, 128),)](
                out, weight_grad, scale, groups, d_out, d_in, *out.stride()[:2],
                *weight_grad.stride(),
                BO=32, BI=128, SCALE=scale is not None, ACCUMULATE=accumulate, num_warps=4,
            )  # fmt: skip
    return dots.sum(0)


def _separate_wgrad_dot(
    weight_grad: Tensor,
    direction: Tensor,
    act: Tensor,
    grad: Tensor,
    scale: Tensor | None,
    accumulate: bool,
    norms: bool,
) -> Tensor:
    """The same by a plain weight gradient and the direction route, for short or no samples."""
    total = mm_fp32(grad.flatten(0, 1).t(), act.flatten(0, 1))
    if scale is not None:
        total.mul_(scale)
    if accumulate:
        weight_grad.add_(total)
    else:
        weight_grad.copy_(total)
    dots = linear_direction_dot(direction, act, grad, False)
    return bordered(dots, linear_sample_dot(act, grad, act, grad)) if norms else dots


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
    """scale · Σ_i G_i into (or added to) weight_grad, (Dout, Din), in its dtype and strides; every
    sample's unscaled bias gradient into bias_grads, (N, Dout) fp32; returns the dots, (K, N)."""
    if scale is not None:  # of any dtype: to cast it would be a launch more
        scale = scale.to(act.device)
    direction, act, grad = (apart_from(weight_grad, x) for x in (direction, act, grad))
    tile = choose_tile("wgrad", act)
    args = (weight_grad, direction, act, grad, scale, accumulate)
    if bias_grads is not None:
        torch.sum(grad, 1, dtype=torch.float32, out=bias_grads)
    empty = 0 in act.shape or 0 in grad.shape
    products = direction_products(direction, act)
    if empty or not config.fused_wgrad_is_cheaper(products, act.shape[1], tile):
        return _separate_wgrad_dot(*args, norms)
    return fused_wgrad_dot(*args, tile, norms=norms)


def linear_wgrad_dot(
    direction: Tensor, act: Tensor, grad: Tensor, scale: Tensor | None, norms: bool = False
) -> tuple[Tensor, Tensor]:
    """scale · Σ_i G_i, (Dout, Din), and the unscaled dots, (K, N), in fp32."""
    weight_grad = act.new_empty((grad.shape[2], act.shape[2]), dtype=torch.float32)
    args = (weight_grad, None, direction, act, grad, scale, False, norms)
    return weight_grad, linear_wgrad_dot_into(*args)


def linear_joint_wgrad_dot(
    act: Tensor, grad: Tensor, val_rows: list[int], scale: Tensor | None, norms: bool = False
) -> tuple[Tensor, Tensor]:
    """The same with directions from the val rows at the end: a library product a target, then
    the fused route; or token products where forming the directions costs more."""
    n, t = act.shape[0] - sum(val_rows), act.shape[1]
    d_in, d_out = act.shape[2], grad.shape[2]
    train = act[:n], grad[:n]
    split = torch.split(act[n:], val_rows), torch.split(grad[n:], val_rows)
    vals: list[tuple[Tensor, Tensor]] = list(zip(*split, strict=True))
    if config.joint_gram_is_cheaper(n, t, d_in, d_out):
        pairs = linear_gram_dot(act[n:], grad[n:], *train, True)
        dots = torch.stack([group.sum(0) for group in torch.split(pairs, val_rows)])
        if norms:
            column = [linear_gram_dot(a, b, a, b, False).sum() for a, b in vals]
            dots = bordered(dots, linear_sample_dot(*train, *train), torch.stack(column))
        weight_grad = mm_fp32(train[1].flatten(0, 1).t(), train[0].flatten(0, 1))
        return weight_grad if scale is None else weight_grad.mul_(scale), dots
    direction = products_fp32((a.flatten(0, 1), b.flatten(0, 1)) for a, b in vals)
    weight_grad, dots = linear_wgrad_dot(direction, *train, scale, norms)
    if norms:
        dots = bordered(dots[:-1], dots[-1], squares(direction))
    return weight_grad, dots
