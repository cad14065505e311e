"""graddot_lm: which training data helps and which hurts, while the model trains.

The modules beside this one are the engine and what a caller's loop meets. Below them: `rules`, how
layers are scored; `checks`, what is proven of a model; `compiling`, torch.compile; and what the
command runs: `text`, `training` and `results`.

What is named here is imported when it is first used, so that `graddot --help` does not wait for
torch, and an interrupt in the seconds that torch takes is the command's to answer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checks.layer_proof import check_layer as check_layer
    from .coverage import Coverage as Coverage
    from .directions import adamw_direction as adamw_direction
    from .engine import GradDotProdEngine as GradDotProdEngine
    from .errors import GraddotError as GraddotError
    from .fused_head import fuse_head as fuse_head
    from .fused_head import linear_cross_entropy as linear_cross_entropy
    from .fused_head import unfuse_head as unfuse_head
    from .rules.table import register_layer as register_layer
    from .scored import Scored as Scored
    from .segments import segment_lengths as segment_lengths

_MODULES = {
    "Coverage": "coverage",
    "GradDotProdEngine": "engine",
    "GraddotError": "errors",
    "Scored": "scored",
    "adamw_direction": "directions",
    "check_layer": "checks.layer_proof",
    "fuse_head": "fused_head",
    "linear_cross_entropy": "fused_head",
    "register_layer": "rules.table",
    "segment_lengths": "segments",
    "unfuse_head": "fused_head",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
