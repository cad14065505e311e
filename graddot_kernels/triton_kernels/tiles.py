"""What the kernels share: the order of tiles, loads of blocks, slices of an accumulator.

Names as in flash-linear-attention: i_ index, o_ offset, p_ pointer, m_ mask, b_ loaded block.
All address arithmetic is in 64 bits.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(i_program, rows, cols, BAND: tl.constexpr):
    """Program → (row, col) of a rows × cols grid of tiles, walked in bands of BAND rows.

    Programs that run at the same time then share both operands' tiles in L2.
    """
    i_band = i_program // (BAND * cols)
    first = i_band * BAND
    height = tl.minimum(rows - first, BAND)
    inside = i_program % (BAND * cols)
    return first + inside % height, inside // height


@triton.jit
def load_block(p_x, o_r, o_c, rows, cols, stride_r, stride_c):
    """A [R, C] block of a matrix, zero outside."""
    p_block = p_x + o_r[:, None].to(tl.int64) * stride_r + o_c[None, :].to(tl.int64) * stride_c
    return tl.load(p_block, mask=(o_r < rows)[:, None] & (o_c < cols)[None, :], other=0.0)


@triton.jit
def halves(b_x):
    """[R, C] → its left and right [R, C / 2], in registers."""
    rows: tl.constexpr = b_x.shape[0]
    half: tl.constexpr = b_x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(b_x, (rows, 2, half)), (0, 2, 1)))
