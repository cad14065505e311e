"""graddot_lm: which training data helps and which hurts, while the model trains."""

from .coverage import Coverage
from .directions import adamw_direction
from .engine import GradDotProdEngine
from .errors import GraddotError

__all__ = ["Coverage", "GradDotProdEngine", "GraddotError", "adamw_direction"]
