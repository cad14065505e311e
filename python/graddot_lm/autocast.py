"""Autocast off where its rounding is not wanted: in what makes gradients and dots."""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor


def no_autocast(kind: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast off for a kind of device. Entering its context costs more than some layers."""
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What autocast computes in on a kind of device; None where it is off."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def autocast_input(x: Tensor) -> Tensor:
    """x in autocast's dtype, as the native linear layer would see it: autocast leaves fp64 alone."""
    cast = x.is_floating_point() and x.dtype != torch.float64
    dtype = autocast_dtype(x.device.type) if cast else None
    return x if dtype is None else x.to(dtype)


def without_autocast(backward):  # type: ignore[no-untyped-def]
    """Backward under an autocast region that the caller left open: dots must not be rounded."""

    @functools.wraps(backward)
    def wrapped(ctx, grad_out):  # type: ignore[no-untyped-def]
        with no_autocast(grad_out.device.type):
            return backward(ctx, grad_out)

    return wrapped
