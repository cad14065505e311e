"""What torch.compile is told: which of our functions it is to leave alone, and when."""

import functools
import sys
from collections.abc import Callable
from typing import Any

_skipped: list[Any] = []  # functions whose own frames the compiler is to leave alone


def skipped(function: Any) -> Any:
    """A function that runs as it is where it is called from outside of a graph."""
    _skipped.append(function)
    return function


def prepare_compiler() -> None:
    """Tell the compiler about `skipped` functions, if there is one; it is slow to import."""
    dynamo = sys.modules.get("torch._dynamo")
    while dynamo is not None and _skipped:
        dynamo.eval_frame.skip_code(_skipped.pop().__code__)


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
