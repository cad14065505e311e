"""Layer inputs that the backward makes again, from tensors that autograd keeps anyway.

A linear layer needs its input for the weight gradient. Where an activation function, a product or
a norm made that input, what it was made of is kept for their own backward, and one pass over it
gives the same bits again. A third of what a GPT-2 block keeps is saved so: more than the direction
of its head takes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The outputs from which on a layer's own products make this cheap beside them: for a GPT-2 of width
# 128 on a CPU making inputs again took 6 % of the step.
_MIN_OUTPUTS = 768


class Recipe:
    """How to make a tensor from its sources, which are saved by whoever will want it.

    Those that share it, as q, k and v do, make it once.
    """

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self._make, self._users = make, 0
        self._made: Tensor | None = None

    def reserve(self) -> None:
        self._users += 1

    def __call__(self, *sources: Tensor | None) -> Tensor:
        made = self._make(*sources) if self._made is None else self._made
        self._users -= 1
        self._made = made if self._users > 0 else None
        return made


Sources = tuple[Tensor | None, ...]


def remember(out: Tensor, make: Callable[..., Tensor], *sources: Tensor | None) -> Tensor:
    """Note on a layer's output what it was made of; for sources that the layer keeps.

    Not under autocast, which may choose other dtypes than the backward will.
    """
    if out.requires_grad and not torch.is_autocast_enabled(out.device.type):
        out.graddot_made_of = Recipe(make), sources  # type: ignore[attr-defined]
    return out


def made_of(x: Tensor, outputs: int) -> tuple[Recipe, Sources]:
    """What a layer with so many outputs saves in place of its input x, and how x is made of it."""
    found = None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # checkpointing, offloading
    if hooks is None and x._version == 0 and outputs >= _MIN_OUTPUTS:
        found = getattr(x, "graddot_made_of", None) or _of_node(x.grad_fn)
    recipe, sources = found or (Recipe(lambda x: x), (x,))
    recipe.reserve()
    return recipe, tuple(None if s is None else s.detach() for s in sources)


def _of_node(node: Any) -> tuple[Recipe, Sources] | None:
    """By its node in the graph, whose `_saved_…` attributes are a documented interface."""
    name = "" if node is None else node.name()
    if name == "GeluBackward0":
        approximate = node._saved_approximate
        return Recipe(lambda x: F.gelu(x, approximate=approximate)), (node._saved_self,)
    if name == "SiluBackward0":
        return Recipe(F.silu), (node._saved_self,)
    if name == "MulBackward0":
        factors = node._saved_self, node._saved_other
        if all(isinstance(factor, Tensor) for factor in factors):  # None: not kept
            return Recipe(torch.mul), factors
    return None
