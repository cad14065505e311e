"""Whole tensors of shards, several in one collective operation.

An operation takes some time to begin, whatever it moves, and most of a model's tensors are small.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .distributed import own_part, whole

TOGETHER = 2**26  # bytes of whole tensors in one operation


class Gathering:
    """What the shards of all processes make, for those who need one tensor after the other.

    What is asked for is gathered with what is expected next. Only the bytes of one operation are
    kept; larger tensors are gathered by themselves. No tensor is gathered twice ahead of its time, so
    that whoever asks in another order than expected has at most twice as much moved.
    """

    def __init__(self) -> None:
        self._bucket: _Bucket | None = None
        self._gathered: set[int] = set()

    def whole(self, x: Tensor, expected: Callable[[], Iterable[Tensor]]) -> Tensor:
        """The whole of one of the tensors that are expected, in about the order in which they come.
        They are to live until they were asked for, and all processes have to ask alike."""
        kind = _kind(x)
        if kind is None or _size(x) > TOGETHER:
            return whole(x)
        if self._bucket is None or id(x) not in self._bucket.places:
            ahead = (y for y in expected() if y is not x and id(y) not in self._gathered)
            tensors = _fitting(x, (y for y in ahead if _kind(y) == kind))
            self._gathered.update(map(id, tensors))
            self._bucket = None  # before there is another
            self._bucket = _Bucket(tensors)
        return self._bucket.whole(x)

    def end(self) -> None:
        """Nothing will be asked for any more."""
        self._bucket = None


def _shard_dims(x: DTensor) -> list[tuple[int, int]]:
    """By dimension of the mesh that shards: which of x's it is."""
    return [(k, p.dim) for k, p in enumerate(x.placements) if isinstance(p, Shard)]


def _kind(x: Tensor) -> Any:
    """What tensors that can be gathered together have in common; None where one cannot."""
    if not isinstance(x, DTensor) or not {type(p) for p in x.placements} <= {Shard, Replicate}:
        return None
    dims = _shard_dims(x)
    if len(dims) != 1 or x.device_mesh.size(dims[0][0]) == 1:
        return None
    return x.device_mesh, dims[0][0], x.dtype


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _fitting(first: Tensor, others: Iterable[Tensor]) -> list[DTensor]:
    """The first, and of the others those that are not large by themselves, up to what does not fit."""
    tensors: list[Any] = [first]
    size = _size(first)
    for x in others:
        if _size(x) > TOGETHER:
            continue
        size += _size(x)
        if size > TOGETHER:
            break
        tensors.append(x)
    return tensors


class _Bucket:
    """Tensors of one kind: every process's shards of all of them, one after the other, each as large
    as the first process's, as `torch.chunk` makes them."""

    def __init__(self, tensors: Sequence[DTensor]) -> None:
        first = tensors[0]
        mesh = first.device_mesh
        ((at, _),) = _shard_dims(first)
        self._processes = mesh.size(at)
        # By id: where a tensor begins, the shape of a shard of it, the dimension and its whole length.
        self.places: dict[int, tuple[int, list[int], int, int]] = {}
        shards, begin = [], 0
        for x in tensors:
            ((_, dim),) = _shard_dims(x)
            shard = self._filled(own_part(x.detach()), x.shape[dim], dim)
            self.places[id(x)] = begin, list(shard.shape), dim, x.shape[dim]
            shards.append(shard.flatten())
            begin += shard.numel()
        own = torch.cat(shards)
        placements = [Shard(0) if isinstance(p, Shard) else p for p in first.placements]
        flat = DTensor.from_local(own, mesh, placements, run_check=False).full_tensor()
        self._shards = flat.view(self._processes, begin)

    def _filled(self, shard: Tensor, length: int, dim: int) -> Tensor:
        shape = list(shard.shape)
        shape[dim] = -(-length // self._processes) - shape[dim]
        return torch.cat([shard, shard.new_zeros(shape)], dim) if shape[dim] else shard

    def whole(self, x: Tensor) -> Tensor:
        begin, shape, dim, length = self.places[id(x)]
        shards = self._shards[:, begin : begin + math.prod(shape)].unflatten(1, shape)
        shards = shards.movedim(0, dim)
        # A copy, for a view would keep all others.
        found = torch.empty_like(shards, memory_format=torch.contiguous_format).copy_(shards)
        found = found.flatten(dim, dim + 1)
        return found if found.shape[dim] == length else found.narrow(dim, 0, length).clone()


def gathered(state: Any, keep: bool) -> Any:
    """A state dict with whole tensors on the CPU in the place of shards, or None unless `keep`.

    To be called by all processes. What is one tensor under two names stays one.
    """
    shards: dict[int, DTensor] = {}
    wholes: dict[int, Tensor | None] = {}
    gathering = Gathering()

    def find(value: Any) -> None:
        if isinstance(value, DTensor):
            shards.setdefault(id(value), value)
        elif isinstance(value, (Mapping, list)):
            for item in value.values() if isinstance(value, Mapping) else value:
                find(item)

    def replaced(value: Any) -> Any:
        if isinstance(value, DTensor):
            return wholes[id(value)]
        if isinstance(value, Mapping):
            return {key: replaced(item) for key, item in value.items()}
        return [replaced(item) for item in value] if isinstance(value, list) else value

    find(state)
    for key, shard in shards.items():
        tensor = gathering.whole(shard, shards.values).detach()
        wholes[key] = tensor.cpu() if keep else None
    return replaced(state)
