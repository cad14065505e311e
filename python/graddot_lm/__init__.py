"""graddot_lm: which training data helps and which hurts, while the model trains."""

from .engine import Coverage, GradDotProdEngine
from .errors import GraddotError

__all__ = ["Coverage", "GradDotProdEngine", "GraddotError"]
