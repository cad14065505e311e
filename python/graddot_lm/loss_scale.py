"""What the caller multiplied the loss by before its backward, which the scores undo.

Every number that a model returns, and every loss passed to `track_loss`, gets a leaf of zero added:
its gradient is the factor, wherever the number went.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checks.verify import map_tensors
from .errors import GraddotError


def _leaf(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=device, requires_grad=True)


def _tracked(loss: Tensor, leaves: list[Tensor]) -> Tensor:
    leaves.append(_leaf(loss.device))
    return loss + leaves[-1].to(loss.dtype)


class LossScale:
    """Of one micro-batch."""

    def __init__(self, device: torch.device) -> None:
        self.compiled = _leaf(device)  # for the loss inside of a compiled graph
        self._returned: list[Tensor] = []  # for every number that the model returned
        self._own: list[Tensor] = []  # for the caller's losses
        # Outputs of which the caller made a loss: a loss that is no number, and in a checked step any.
        self._unreduced: list[str] = []
        self._others: list[str] = []

    def tracked(self, loss: Tensor) -> Tensor:
        """A loss of the caller's own."""
        return _tracked(loss, self._own)

    def tracked_output(self, output: Any, checked: bool) -> Any:
        """A model's output, its numbers tracked; in a `checked` step the rest is watched, too."""
        loss = output.get("loss") if isinstance(output, Mapping) else None

        def replaced(x: Tensor) -> Tensor:
            if not x.requires_grad:
                return x
            if x.dim() == 0:
                return _tracked(x, self._returned)
            if x is loss:
                return _watched(x, self._unreduced)
            return _watched(x, self._others) if checked else x

        return map_tensors(output, replaced)

    def factors(self) -> list[Tensor]:
        """Of each tracked loss that was used: of the caller's own, else of the model's."""
        own, returned = (
            [leaf.grad for leaf in leaves if leaf.grad is not None]
            for leaves in (self._own, self._returned)
        )
        compiled = self.compiled.grad
        if own or compiled is None:
            return own or returned
        # A compiled graph gives all its outputs a gradient, 0 where the loss inside is not used.
        # Only beside another loss has the host to know which.
        if not returned:
            return [torch.where(compiled != 0, compiled, 1.0)]
        return [*returned, compiled] if compiled != 0 else returned

    @property
    def is_own(self) -> bool:
        """Whether the backward was that of a loss of the caller's own."""
        return any(leaf.grad is not None for leaf in self._own)

    def factor(self) -> Tensor:
        """What the loss was multiplied by, 0-dim fp64; 1 if none was tracked."""
        factors = self.factors()
        return factors[0] if factors else torch.ones_like(self.compiled, requires_grad=False)

    def check(self) -> None:
        """Raise GraddotError if the factor cannot be told."""
        factors = self.factors()
        if self.is_own:
            if len(factors) > 1:
                raise GraddotError(
                    "two losses were tracked, so that their scale cannot be told; add them up and pass"
                    " the sum to track_loss"
                )
            return
        problem = None
        if len(factors) > 1 and any(bool(f != factors[0]) for f in factors[1:]):
            values = [float(f) for f in factors]
            problem = f"{len(factors)} numbers that the model returned, with the factors {values}"
        elif self._unreduced:
            problem = f"the model's loss of shape {self._unreduced[0]}, which is no number"
        elif factors and self._others:
            problem = f"the model's output of shape {self._others[0]} beside its loss"
        if problem is not None:
            raise GraddotError(
                f"the loss is made of {problem}, so that its scale cannot be told; pass the whole loss"
                " to track_loss, before you scale it"
            )


def _watched(x: Tensor, used: list[str]) -> Tensor:
    """The same tensor, whose shape is noted once a gradient comes back to it."""

    def note(grad: Tensor | None) -> None:  # None where DDP has none
        if grad is not None and not used and bool(grad.any()):
            used.append(str(tuple(x.shape)))

    alias = x.view_as(x)
    alias.register_hook(note)
    return alias
