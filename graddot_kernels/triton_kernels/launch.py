"""What every launcher needs from the machine: its architecture, its context, descriptors."""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import Tile, cdiv, tile_for

_SMS_IN_INTERPRETER = 4
_WORTH_A_COPY = 2**20
_ARCH = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}


@functools.lru_cache
def machine(device: torch.device) -> tuple[str, int]:
    """(row of the tile tables, multiprocessors) of a device; a CPU is Triton's interpreter."""
    if device.type == "cpu":
        return "interpreter", _SMS_IN_INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return "gfx942", properties.multi_processor_count
    arch = _ARCH.get((properties.major, properties.minor), "small")
    return arch, properties.multi_processor_count


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; make that x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def precision(x: Tensor) -> str:
    """How the matrix units treat x: true fp32 unless the user allowed tf32, as in torch.mm. AMD's
    take fp32 as it is."""
    # Not allow_tf32, which raises once tf32 was allowed by the newer of torch's two interfaces.
    allowed = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and torch.version.hip is None else "ieee"


def choose_tile(op: str, x: Tensor) -> Tile:
    kind = {"tf32": "tf32", "ieee": "fp32"}[precision(x)] if x.dtype == torch.float32 else "half"
    return tile_for(op, machine(x.device)[0], kind)


def options(tile: Tile) -> dict[str, Any]:
    # Named because its default is about to change in Triton: contraction is wanted here.
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def fits_descriptor(x: Tensor) -> bool:
    """Whether the copy engine can read x: aligned base and rows, contiguous last dimension."""
    rows = all(s > 0 and s * x.itemsize % 16 == 0 for s in x.stride()[:-1])
    return x.data_ptr() % 16 == 0 and rows and x.stride(-1) == 1 and x.numel() > 0


def aligned_width(x: Tensor) -> int:
    """Columns of x (N, T, D) for a kernel to load: D, or the multiple of 16 above it if the memory
    behind every row has as many. A mask that ends in between would make the loads scalar ones."""
    d = x.shape[-1]
    width = cdiv(d, 16) * 16
    if width == d or 0 in x.shape or x.stride(-1) != 1 or any(s % 16 for s in x.stride()[:-1]):
        return d
    last = sum((size - 1) * s for size, s in zip(x.shape[:-1], x.stride()[:-1], strict=True))
    end = (x.storage_offset() + last + width) * x.itemsize
    return width if end <= x.untyped_storage().nbytes() else d


def aligned_rows(x: Tensor) -> Tensor:
    """x (N, T, D), or where it is large a copy whose rows begin at multiples of 16 elements: else
    all loads are of single ones, as of the logits of an odd vocabulary."""
    aligned = x.stride(-1) != 1 or all(s % 16 == 0 for s in x.stride()[:-1])
    if aligned or x.numel() < _WORTH_A_COPY:
        return x
    d = x.shape[-1]
    return x.new_empty((*x.shape[:-1], cdiv(d, 16) * 16))[..., :d].copy_(x)


def descriptor(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """x (N, T, D) in blocks of one sample's rows × cols."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, cols])


def flat_tokens(x: Tensor) -> Tensor | None:
    """(N, T, D) as one sample of N·T tokens, or None where the strides forbid a view."""
    n, t, d = x.shape
    if n > 1 and t > 1 and x.stride(0) != t * x.stride(1):
        return None
    step = x.stride(0) if t == 1 else x.stride(1)
    # The only sample's stride is never taken, but of 0 no descriptor is made.
    return x.as_strided((1, n * t, d), (n * t * step, step, x.stride(2)))
