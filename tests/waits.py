"""What in a step would make the host wait for a GPU, as seen on a CPU."""

from collections import Counter
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

VALUES = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"}  # on the host
# Whose result's shape depends on values.
SHAPES = {"_unique2", "unique_dim", "masked_select", "bincount", "index by a mask"}


class Waits(TorchDispatchMode):
    """Counts operations by name. Those inside of an op of ours are seen if whoever runs it enters
    `Waits.current` again."""

    current: "Waits | None" = None

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __enter__(self):
        Waits.current = self
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0].removeprefix("aten::")
        if name.startswith(("index", "_index")) and any(map(_is_mask, args)):
            name = "index by a mask"
        self.seen[name] += 1
        return func(*args, **(kwargs or {}))

    def waiting(self, names: Iterable[str]) -> dict[str, int]:
        return {name: self.seen[name] for name in names if self.seen[name]}


def _is_mask(indices) -> bool:
    tensors = indices if isinstance(indices, list | tuple) else ()
    return any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tensors)
