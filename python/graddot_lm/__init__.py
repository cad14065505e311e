"""graddot_lm: which training data helps and which hurts, while the model trains."""

from .engine import Coverage, GradDotProdEngine
from .errors import GraddotError
from .fused_head import fuse_head, linear_cross_entropy, unfuse_head

__all__ = [
    "Coverage",
    "GradDotProdEngine",
    "GraddotError",
    "fuse_head",
    "linear_cross_entropy",
    "unfuse_head",
]
