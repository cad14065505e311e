"""Copies of a layer in float64, on which its rule is proven."""

import contextlib
import copy
import types
from typing import Any

import torch
from torch import nn

from .. import distributed
from ..scored import ScoredForward


def exact_copy(module: nn.Module) -> nn.Module:
    """In float64, experts by the implementation of transformers that has it. The parameters are
    moved a little: behind a gate that begins with zero no gradient would show what is wrong."""
    distributed.check_not_sharded_itself(module)
    copied = copy.deepcopy(module).double()
    for part, own in zip(module.modules(), copied.modules(), strict=True):
        if _calls_scored(part.__dict__.get("forward")):  # the one of this module, not of the copy
            own.__dict__.pop("forward")
        if (function := _function_of_its_own(part)) is not None:
            own.forward = types.MethodType(function, own)  # type: ignore[method-assign]
    _rebind(module, copied)
    generator = torch.Generator().manual_seed(0)
    for p in copied.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=generator, device="cpu").to(p.device)
    for part in copied.modules():
        if hasattr(getattr(part, "config", None), "_experts_implementation"):
            part.config._experts_implementation = "eager"  # type: ignore[union-attr]
    return copied


def _rebind(module: nn.Module, copied: nn.Module) -> None:
    """Let functions that a copy's layers keep, as a lambda for a head that is tied, use what is the copy's:
    deepcopy leaves a function as it is, with the layers it was made for."""
    pairs = list(zip(module.modules(), copied.modules(), strict=True))
    own: dict[int, Any] = {id(part): twin for part, twin in pairs}
    for part, twin in pairs:
        own |= {id(p): twin._parameters[name] for name, p in part._parameters.items()}
        own |= {id(x): twin._buffers[name] for name, x in part._buffers.items()}
    own.pop(id(None), None)

    def rebound(x: Any) -> Any:
        if isinstance(x, types.MethodType) and id(x.__self__) in own:
            return types.MethodType(x.__func__, own[id(x.__self__)])
        if not isinstance(x, types.FunctionType) or x.__closure__ is None:
            return own.get(id(x), x)
        if id(x) not in own:
            cells = tuple(types.CellType() for _ in x.__closure__)
            new = types.FunctionType(x.__code__, x.__globals__, x.__name__, x.__defaults__, cells)
            new.__kwdefaults__, own[id(x)] = x.__kwdefaults__, new
            new.__dict__ |= x.__dict__
            for cell, old in zip(cells, x.__closure__, strict=True):
                with contextlib.suppress(ValueError):  # of a name that has no value yet
                    cell.cell_contents = rebound(old.cell_contents)
        return own[id(x)]

    for _, twin in pairs:
        for name, x in twin.__dict__.items():
            if isinstance(x, types.FunctionType):
                twin.__dict__[name] = rebound(x)


def _calls_scored(forward: Any) -> bool:
    """Whether it is a function around a scored forward, as transformers 4 puts one on a layer whose output it
    records."""
    around = not isinstance(forward, ScoredForward)
    while forward is not None and not isinstance(forward, ScoredForward):
        forward = getattr(forward, "__wrapped__", None)
    return around and forward is not None


def _function_of_its_own(module: nn.Module) -> Any:
    """The function of a method that stands on a module as its forward, as TRL puts one there, where a
    scored forward is around it, which a copy has not: without the autocast that accelerate puts around."""
    scored = module.__dict__.get("forward")
    if not isinstance(scored, ScoredForward):
        return None
    method = module.__dict__.get("_original_forward", scored.own_forward)
    function = getattr(method, "__func__", None)
    own = (
        function is not None and method.__self__ is module and function is not type(module).forward
    )
    return function if own else None
