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


class Eagerly:
    """Until `end`, whatever torch.compile made runs as if it had not."""

    def __init__(self) -> None:
        self._stance: Any = None

    def begin(self) -> None:
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is not None and self._stance is None:
            self._stance = dynamo.set_stance("force_eager")

    def end(self) -> None:
        if self._stance is not None:
            stance, self._stance = self._stance, None
            stance.__exit__(None, None, None)
