"""graddot_lm: which training data helps and which hurts, while the model trains."""

from .coverage import Coverage
from .directions import adamw_direction
from .engine import GradDotProdEngine
from .errors import GraddotError
from .fused_head import fuse_head, linear_cross_entropy, unfuse_head

__all__ = [
    "Coverage",
    "GradDotProdEngine",
    "GraddotError",
    "adamw_direction",
    "fuse_head",
    "linear_cross_entropy",
    "unfuse_head",
]
