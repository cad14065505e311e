"""graddot_lm: which training data helps and which hurts, while the model trains."""

from .check import check_layer
from .engine import Coverage, GradDotProdEngine
from .errors import GraddotError
from .rules import register_layer
from .scored import Scored

__all__ = [
    "Coverage",
    "GradDotProdEngine",
    "GraddotError",
    "Scored",
    "check_layer",
    "register_layer",
]
