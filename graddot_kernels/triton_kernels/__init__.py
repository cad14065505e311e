"""The GPU implementations, in Triton: one file an op family, its kernels and then its launchers.

Nothing here imports Triton until an op first runs on a GPU, so that the package works without it.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@functools.lru_cache
def _too_old(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)


def gpu_implementation(family: str, name: str, fallback: Callable[..., Any]) -> Callable[..., Any]:
    """The launcher `name` of file `family`, or the plain-PyTorch form where Triton cannot serve:
    where it is not installed, for fp64, and on a GPU older than its matrix instructions (sm_80).
    A scale may be fp64 all the same: a single number, which the kernels take in fp32.
    """
    if importlib.util.find_spec("triton") is None:
        return fallback

    @functools.lru_cache
    def launcher() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"{__name__}.{family}"), name)  # type: ignore[no-any-return]

    def run(*args: Any) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        wide = any(x.dtype == torch.float64 and x.dim() > 0 for x in tensors)
        if wide or _too_old(tensors[0].device):
            return fallback(*args)
        return launcher()(*args)

    run.__module__, run.__name__ = f"{__name__}.{family}", name
    return run
