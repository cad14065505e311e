"""A call once for every row, by torch.vmap or in a loop; autograd functions of one's own, which need
that loop, are made to be seen."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import GraddotError
from .layers import ScoredFunction

# A classmethod, of Python or, as of torch 2.15, of C++.
_apply = torch.autograd.Function.__dict__["apply"]
_running, _before, _lock = 0, None, threading.Lock()


@contextlib.contextmanager
def functions_seen() -> Iterator[None]:
    """Inside of it, in whichever thread, calls of autograd functions are seen."""
    global _running, _before
    with _lock:
        if not _running:
            _before = torch.autograd.Function.__dict__["apply"]
            torch.autograd.Function.apply = classmethod(_seen_apply)  # type: ignore[method-assign, assignment]
        _running += 1
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if not _running:
                torch.autograd.Function.apply = _before  # type: ignore[method-assign, assignment]


def _seen_apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    """A call of an autograd function of one's own, which is not seen as other calls are."""
    if issubclass(cls, ScoredFunction) or not has_torch_function(args):
        return _apply.__get__(None, cls)(*args, **kwargs)

    def function(*args: Any, **kwargs: Any) -> Any:
        return _apply.__get__(None, cls)(*args, **kwargs)

    function.__name__, function.custom = cls.__name__, True  # type: ignore[attr-defined]
    return handle_torch_function(function, args, *args, **kwargs)


def is_custom(func: Any) -> bool:
    return hasattr(func, "custom")


def over_rows(
    one: Callable[..., Any], *arguments: Any, loop: bool = False, randomness: str = "different"
) -> Any:
    """`one` mapped over the rows of its arguments: by torch.vmap, or in a loop where that cannot, as
    an autograd function of one's own, or entries that a mask picks."""
    if not loop:
        try:
            return torch.vmap(one, randomness=randomness)(*arguments)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
    rows = len(tree_leaves(arguments)[0])
    results = [one(*tree_map(lambda x: x[i], arguments)) for i in range(rows)]  # noqa: B023
    stack = lambda *x: torch.stack(x) if isinstance(x[0], Tensor) else x[0]
    return tree_map(stack, *results)


def too_large(module: nn.Module, size: int) -> GraddotError:
    return GraddotError(
        f"its {size:,} elements are too many to hold a gradient of every sample;"
        f" register_layer({type(module).__name__}) allows it"
    )
