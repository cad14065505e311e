"""Loads the compiled library, `_C.abi3.so`, and says what was built.

The library registers its implementations of `torch.ops.graddot` as it is loaded (csrc/). It uses
LibTorch's stable ABI and no Python symbol: one build serves every Python and torch from 2.11 on.
"""

import ctypes
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("_C.abi3.so")


def _load() -> ctypes.CDLL:
    if not PATH.exists():
        raise ImportError(
            f"graddot_kernels' compiled library is not built ({PATH} does not exist). Build it with"
            " `pip install --no-build-isolation -e .` in the source tree (torch and cmake installed);"
            " if graddot is installed, this is its source tree, which Python started in it finds"
            " first: start Python elsewhere, or with -P"
        )
    try:
        return ctypes.CDLL(str(PATH))
    except OSError as e:
        raise ImportError(
            f"graddot_kernels' compiled library is there but does not load under torch"
            f" {torch.__version__}: {e}. It needs torch 2.11 or newer, and the CUDA build of torch"
            " if it was built with one; rebuild it with `pip install --no-build-isolation .`"
        ) from e


library = _load()
library.graddot_build.restype = ctypes.c_char_p
library.graddot_instruction_set.restype = ctypes.c_char_p
_build: dict[str, str] = json.loads(library.graddot_build())

HAS_CUDA = bool(_build["cuda_architectures"])


def build_info() -> dict[str, Any]:
    """What was built and what runs where.

    Keys: version, extension (its path), devices, instruction_set (of the CPU's compiled linear and
    loss kernels; "" where PyTorch serves instead), cuda_architectures, compiler, cuda_compiler
    ("" without one), built_with_torch, torch, triton (None if absent), and routes: for every op
    and device the module that implements it there, `graddot_kernels._C` being the extension.
    """
    from . import __version__, cpu_kernels, ops  # they import this module

    try:
        triton_version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton_version = None
    return {
        "version": __version__,
        "extension": str(PATH),
        "devices": ["CPU", "CUDA"] if HAS_CUDA else ["CPU"],
        "instruction_set": cpu_kernels.INSTRUCTION_SET,
        "cuda_architectures": _build["cuda_architectures"].split(),
        "compiler": _build["compiler"],
        "cuda_compiler": _build["cuda_compiler"],
        "built_with_torch": _build["torch"],
        "torch": torch.__version__,
        "triton": triton_version,
        "routes": ops.routes,
    }
