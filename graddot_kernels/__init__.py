"""graddot_kernels: dot products of gradients with every sample's gradient, none materialised."""

from ._extension import build_info
from .functional import (
    embedding_direction_dot,
    embedding_ghost_dot,
    embedding_joint_wgrad_dot,
    embedding_wgrad_dot,
    linear_direction_dot,
    linear_ghost_dot,
    linear_joint_wgrad_dot,
    linear_wgrad_dot,
    linear_wgrad_dot_into,
    norm_ghost_dot,
    norm_sample_grads,
    norm_wgrad_dot,
)

__version__ = "0.1.0"

__all__ = [
    "build_info",
    "embedding_direction_dot",
    "embedding_ghost_dot",
    "embedding_joint_wgrad_dot",
    "embedding_wgrad_dot",
    "linear_direction_dot",
    "linear_ghost_dot",
    "linear_joint_wgrad_dot",
    "linear_wgrad_dot",
    "linear_wgrad_dot_into",
    "norm_ghost_dot",
    "norm_sample_grads",
    "norm_wgrad_dot",
]
