"""Tile shapes per architecture, and the counts by which a launcher divides its work.

The tables are reasoned, not searched: a user's first step never waits for tuning. What decides:
- Two fp32 accumulators of a 128 × 128 tile are 128 registers a thread at 8 warps, and a direction's
  tile of fp32 64 more: that fits, where the products are not in registers themselves (as on sm_80)
  and a loop's pointers take few. 128 × 256 does not fit (it spills 656 bytes on sm_90).
- A 64-deep 16-bit step fills one 128-byte shared-memory row, the widest swizzle that the matrix
  units read; four stages of it are 128 KiB, which sm_90 and sm_100 have and sm_80 has not.
- True fp32 runs on the ordinary multiply-add units, where small tiles lose nothing.
`make aot` compiles every row and fails where a hot kernel spills.
"""

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """One kernel's tile: `rows` × `cols` of the product, `depth` of the summed dimension a step."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    slices: int = 1  # column slices in which the second operand of the epilogue is read
    resident: int = 0  # widest element, in bytes, of a direction's tile kept in registers
    tma: bool = False  # load tokens through tensor descriptors
    per_sm: int = 1  # programs that fit on a multiprocessor


# kind: "half" is bf16 and fp16, "fp32" true fp32, "tf32" fp32 rounded to tf32 on the matrix units.
# "small" is every NVIDIA GPU with about 100 KiB of shared memory (sm_86, sm_89, sm_120) or unknown.
# "interpreter" has tiles so small that a small test crosses their edges.
_WGRAD = {
    ("sm_80", "half"): Tile(128, 128, 32, 8, 4, slices=4, resident=2),
    ("sm_90", "half"): Tile(128, 128, 64, 8, 4, slices=4, resident=4),
    ("sm_100", "half"): Tile(128, 128, 64, 8, 4, slices=2, resident=4),
    ("gfx942", "half"): Tile(128, 128, 32, 8, 2, slices=2, resident=4),
    ("small", "half"): Tile(128, 64, 32, 8, 3, resident=2, per_sm=2),
    ("any", "fp32"): Tile(64, 64, 16, 8, 2, per_sm=2),
    ("any", "tf32"): Tile(64, 64, 32, 8, 3, resident=4, per_sm=2),
    ("interpreter", "any"): Tile(32, 16, 16, 4, 2, slices=2, resident=2),
}
_GRAM = {
    ("sm_80", "half"): Tile(128, 128, 32, 8, 4),
    ("sm_90", "half"): Tile(128, 128, 64, 8, 4),
    ("sm_100", "half"): Tile(128, 128, 64, 8, 4),
    ("gfx942", "half"): Tile(128, 128, 32, 8, 2),
    ("small", "half"): Tile(128, 64, 32, 8, 3),
    ("any", "fp32"): Tile(64, 64, 16, 8, 2),
    ("any", "tf32"): Tile(64, 64, 32, 8, 3),
    ("interpreter", "any"): Tile(16, 16, 16, 4, 2),
}
_DIRECTION = {
    ("sm_80", "half"): Tile(128, 128, 32, 8, 4, slices=2),
    ("sm_90", "half"): Tile(128, 256, 64, 8, 3, slices=4),
    ("sm_100", "half"): Tile(128, 256, 64, 8, 3, slices=4),
    ("gfx942", "half"): Tile(128, 128, 32, 8, 2, slices=2),
    ("small", "half"): Tile(128, 64, 32, 8, 3),
    ("any", "fp32"): Tile(64, 64, 16, 8, 2),
    ("any", "tf32"): Tile(64, 64, 32, 8, 3),
    ("interpreter", "any"): Tile(16, 32, 16, 4, 2, slices=4),
}
# Rows are tokens here, 16-byte loads of 128 columns; nothing is summed through `depth`.
_NORM = {("any", "any"): Tile(32, 128, 1, 4, 3), ("interpreter", "any"): Tile(8, 16, 1, 4, 2)}
# A row of logits, 16 of its elements a thread at a time.
_CROSS_ENTROPY = {
    ("any", "any"): Tile(1, 4096, 1, 8, 2),
    ("interpreter", "any"): Tile(1, 16, 1, 4, 2),
}

TABLES = {
    "wgrad": _WGRAD,
    "gram": _GRAM,
    "direction": _DIRECTION,
    "norm": _NORM,
    "cross_entropy": _CROSS_ENTROPY,
}


def tile_for(op: str, arch: str, kind: str) -> Tile:
    """The row of op's table that fits best: this architecture's, else any's."""
    table = TABLES[op]
    for key in ((arch, kind), (arch, "any"), ("any", kind), ("any", "any"), ("small", kind)):
        if key in table:
            return table[key]
    raise KeyError(f"no {op} tile for {arch}, {kind}")


def packed(tokens: int, block: int) -> int:
    """Tile rows that one sample takes: a whole tile, or the next power of two of a short one.

    A tile then holds block // packed samples, and at most half of it is padding.
    """
    return min(block, 1 << max(0, tokens - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


# Writing and reading back one tile of a partial weight gradient, 8 bytes an element at 3 TB/s,
# in steps of the matrix product (64 multiply-adds an element at 700 TFLOP/s over 132 SMs).
_PARTIAL_STEPS_PER_TILE = 0.1
# The boundary product of one sample, in the same steps.
_BOUNDARY_STEPS = 1
_WORKSPACE_ELEMENTS = 64 * 1024 * 1024


@functools.lru_cache(maxsize=1024)  # of a model's few shapes: the search takes as long as a launch
def wgrad_samples(tiles: int, n: int, t: int, tile: Tile, sms: int) -> int:
    """Samples a program walks, so that tiles × groups of samples fill the chip's last wave.

    More groups balance the waves better and cost a partial weight gradient each.
    """
    slots, steps = sms * tile.per_sm, cdiv(t, tile.depth) + _BOUNDARY_STEPS
    most = max(1, _WORKSPACE_ELEMENTS // (tiles * tile.rows * tile.cols))

    def cost(samples: int) -> float:
        groups = cdiv(n, samples)
        partial = groups * tiles * _PARTIAL_STEPS_PER_TILE if groups > 1 else 0.0
        return cdiv(tiles * groups, slots) * samples * steps + partial

    candidates = {cdiv(n, groups) for groups in range(1, min(n, most, 64) + 1)}
    return min(sorted(candidates, reverse=True), key=cost)


def fused_wgrad_is_cheaper(products: int, t: int, tile: Tile) -> bool:
    """Whether walking samples costs less than a plain weight gradient and the direction route.

    Counted in multiply-adds per sample and weight: whole steps and a boundary against t tokens
    for the weight gradient and t a product of the directions. Short samples waste their steps.
    """
    steps = cdiv(t, tile.depth) + _BOUNDARY_STEPS
    return steps * tile.depth <= (1 + products) * t


def joint_gram_is_cheaper(n: int, t: int, d_in: int, d_out: int) -> bool:
    """Whether dots by token products cost less than forming the val rows' directions.

    Per val token: n·t·(Din + Dout) multiply-adds against Din·Dout.
    """
    return n * t * (d_in + d_out) < d_in * d_out


def norm_parts(programs: int, t: int, tile: Tile, sms: int) -> int:
    """Parts into which a sample's tokens are cut, for about eight programs a multiprocessor."""
    return min(cdiv(t, tile.rows), cdiv(8 * sms, max(1, programs)))
