"""Parts of a batch's rows, on which a model is run to see whether it keeps samples apart."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


def take_rows(x: Tensor, index: list[int], rows: int, entries: Collection[int] = ()) -> Tensor:
    """Some of the samples of (rows, ...), or of (rows·S, ...) with one of these S; a tensor without
    samples itself."""
    if x.dim() > 0 and x.shape[0] == rows:
        return x[index]
    if x.dim() > 0 and x.shape[0] in [rows * number for number in entries if number]:
        return x.unflatten(0, (rows, -1))[index].flatten(0, 1)
    return x


# By id of a tensor among a model's inputs that holds several entries of every row, one row's after the
# other's: how many each row has.
Entries = Mapping[int, Sequence[int]]


def entries_of(kwargs: Mapping[str, Any], rows: int) -> Entries:
    """The patches of images, of which every row has one: as many as its entry in a grid says, as
    vision-language models of transformers have it."""
    found = {}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        grid, patches = kwargs.get(f"{kind}_grid_thw"), kwargs.get(name)
        if isinstance(grid, Tensor) and isinstance(patches, Tensor) and grid.shape == (rows, 3):
            counts = grid.prod(1).tolist()
            if sum(counts) == len(patches) != rows:
                found[id(patches)] = counts
    return found


def take_inputs(arguments: Any, index: list[int], rows: int, entries: Entries) -> Any:
    """`take_rows` of all tensors among a model's inputs."""

    def one(x: Tensor) -> Tensor:
        if id(x) not in entries:
            return take_rows(x, index, rows)
        parts = x.split(list(entries[id(x)]))
        return torch.cat([parts[i] for i in index])

    return tree_map_only(Tensor, one, arguments)


def splits_of(rows: int, thorough: bool = True) -> list[tuple[list[int], list[int]]]:
    """The rows in two parts, (later, earlier), in so many ways that any two rows are apart in one; or
    in one way. None of a single row."""
    if not thorough:
        return splits_of(rows)[:1]
    if rows < 4:
        return [([i for i in range(rows) if i != k], [k]) for k in range(rows - 1)]
    signs = [[i >= rows // 2 for i in range(rows)]]  # the later half first
    signs += [[i >> b & 1 == 1 for i in range(rows)] for b in range((rows - 1).bit_length())]
    parts = [
        ([i for i in range(rows) if sign[i]], [i for i in range(rows) if not sign[i]])
        for k, sign in enumerate(signs)
        if sign not in signs[:k]
    ]
    # But for one row alone, which models may squeeze; it is apart from its half in other ways, too.
    return [part for part in parts if min(map(len, part)) > 1]


def filled_up(parts: list[list[int]], runs: int) -> list[list[int]]:
    """At least as many parts, the last of them several times."""
    return parts + parts[-1:] * (runs - len(parts))


class Numbers(NamedTuple):
    """What a run of a model gave without dimensions: by place among what it returned, and by name what its
    modules hold; and a Hugging Face mixture's loss that balances experts."""

    values: dict[int | str, Tensor]
    aux_loss: Tensor | None


@dataclass
class ModelInputs:
    """What a model of a step is called with, and on what parts of its rows the checks run it: where they
    are `thorough`, on so many that any two rows are apart in one; and on at least `runs` of them, as on
    the other processes that share it. numbers are what it gave for those that it ran on already."""

    args: Any
    kwargs: Mapping[str, Any]
    rows: int
    thorough: bool
    runs: int = 0
    numbers: dict[tuple[int, ...], Numbers] = field(default_factory=dict)
    entries: Entries = field(init=False)

    def __post_init__(self) -> None:
        self.entries = entries_of(self.kwargs, self.rows)

    @property
    def both(self) -> tuple[Any, Mapping[str, Any]]:
        return self.args, self.kwargs

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in tree_leaves(self.both) if isinstance(x, Tensor)]

    def take(self, arguments: Any, which: Sequence[int]) -> Any:
        """`arguments`, whose tensors are of these, of some of the rows."""
        return take_inputs(arguments, list(which), self.rows, self.entries)
