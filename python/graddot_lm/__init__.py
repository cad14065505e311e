"""graddot_lm: which training data helps and which hurts, while the model trains."""

from .check import check_layer
from .coverage import Coverage
from .directions import adamw_direction
from .engine import GradDotProdEngine
from .errors import GraddotError
from .fused_head import fuse_head, linear_cross_entropy, unfuse_head
from .rules import register_layer
from .scored import Scored

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
