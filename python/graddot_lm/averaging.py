"""The processes over which a model's gradients are averaged, and what they agree on."""

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor, nn

from . import distributed


class Averaging:
    """Asked in the forward under way, whose wrapper tells which processes they are if nobody else
    does. Whatever asks the others has to be called in all of them."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], given: dist.ProcessGroup | None
    ) -> None:
        self._parameters, self._given = list(parameters.values()), given
        self.sharded = distributed.is_sharded(self._parameters)

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return distributed.averaging_group(self._parameters, self._given)

    def world_size(self) -> int:
        return distributed.world_size(self._group)

    def summed(self, value: Tensor) -> Tensor:
        distributed.check_all_answer()
        return distributed.summed(value, self._group)

    def largest(self, number: int) -> int:
        distributed.check_all_answer()
        device = distributed.own_part(self._parameters[0]).device
        return distributed.largest(number, self._group, device)

    def agreed(self, x: bool) -> bool:
        """Whether it is so: of a sharded model, in any of its processes, all of which then run the
        model once more."""
        return bool(self.largest(int(x))) if self.sharded else x
