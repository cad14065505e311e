"""What torch.compile is told: which of our functions it is to leave alone, and when."""

import functools
import sys
from collections.abc import Callable
from typing import Any

# Functions of which the compiler is yet to be told: whose own frames it is to leave alone, and those that are
# one call in its graphs.
_skipped: list[Any] = []
_whole: list[Any] = []


def skipped(function: Any) -> Any:
    """A function that runs as it is where it is called from outside of a graph."""
    _skipped.append(function)
    return function


def left_to_autograd(function: Any) -> Any:
    """A function, of tensors and constants, that a graph holds as one call, which autograd traces.

    For calls of an autograd.Function: by its bytecode, forward and backward each for itself, the compiler's
    front takes three times as long about a layer as for one that is not scored.
    """
    _whole.append(function)
    return function


def prepare_compiler() -> None:
    """Tell the compiler, if there is one, for it is slow to import, of the functions above."""
    dynamo = sys.modules.get("torch._dynamo")
    while dynamo is not None and _skipped:
        dynamo.eval_frame.skip_code(_skipped.pop().__code__)
    while dynamo is not None and _whole:
        dynamo.allow_in_graph(_whole.pop())


def uncompiled(reason: str) -> Callable[[Any], Any]:
    """A function that the compiler leaves alone; a graph in which it is called breaks there."""

    def decorate(function: Any) -> Any:
        disabled: list[Any] = []

        @functools.wraps(function)
        def outside(*args: Any, **kwargs: Any) -> Any:
            dynamo = sys.modules.get("torch._dynamo")
            if dynamo is None:
                return function(*args, **kwargs)
            if not disabled:
                disabled.append(dynamo.disable(function))
            return disabled[0](*args, **kwargs)

        skipped(outside)
        outside._torchdynamo_disable = True  # type: ignore[attr-defined]
        outside._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return outside

    return decorate


_stance: Any = None  # the context of `run_uncompiled`
_owner = 0


def run_uncompiled(owner: int) -> None:
    """Whatever torch.compile made runs as if it had not, in all of the process, until
    `run_compiled`; owner is a number of whoever wants it."""
    global _stance, _owner
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and _stance is None:
        _stance, _owner = dynamo.set_stance("force_eager"), owner


def run_compiled(owner: int | None = None) -> None:
    """The end of it, whoever wanted it, or only if this owner did."""
    global _stance
    if _stance is not None and owner in (None, _owner):
        stance, _stance = _stance, None
        stance.__exit__(None, None, None)
