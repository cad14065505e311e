"""graddot_lm: which training data helps and which hurts, while the model trains.

What is named here is imported when it is first used, so that `graddot --help` does not wait for
torch, and an interrupt in the seconds that torch takes is the command's to answer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .check import check_layer
    from .coverage import Coverage
    from .directions import adamw_direction
    from .engine import GradDotProdEngine
    from .errors import GraddotError
    from .fused_head import fuse_head, linear_cross_entropy, unfuse_head
    from .rules import register_layer
    from .scored import Scored

_MODULES = {
    "Coverage": "coverage",
    "GradDotProdEngine": "engine",
    "GraddotError": "errors",
    "Scored": "scored",
    "adamw_direction": "directions",
    "check_layer": "check",
    "fuse_head": "fused_head",
    "linear_cross_entropy": "fused_head",
    "register_layer": "rules",
    "unfuse_head": "fused_head",
}

__all__ = [
    "Coverage",
    "GradDotProdEngine",
    "GraddotError",
    "Scored",
    "adamw_direction",
    "check_layer",
    "fuse_head",
    "linear_cross_entropy",
    "register_layer",
    "unfuse_head",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
