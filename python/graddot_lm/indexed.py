"""The items of a dataset with what identifies them, through a DataLoader and the collator of whoever
trains: their index, or of a stream, which has none, a number of their own."""

import copy
import datetime
import decimal
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .errors import GraddotError
from .segments import flattened_lengths

INDEX = "graddot_index"
LENGTHS = "graddot_lengths"
_LARGEST = torch.iinfo(torch.int64).max


class Indexed(Dataset):
    """A dataset whose items come with their index. Whatever else it has, as a `set_epoch` that loaders
    call, is its own."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):  # as it is pickled for a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Any]]:
        fetch = getattr(self.dataset, "__getitems__", None)
        items = fetch(indices) if fetch else [self.dataset[i] for i in indices]
        return list(zip(indices, items, strict=True))


def content_id(item: Any) -> int:
    """The sample_id of a stream's item: 63 bits of the BLAKE2b digest of all that it holds.

    The same in every process, epoch and run, and for items that are equal; of a million different
    ones, two share theirs with a probability of 5e-8. Raises GraddotError for what is not made of
    numbers, text, bytes, dates, arrays, lists and mappings.
    """
    try:
        text = json.dumps(item, sort_keys=True, default=_plain)
    except (TypeError, ValueError) as error:  # keys that are not text; circles
        raise GraddotError(f"an item of the training set has no sample_id: {error}") from error
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _plain(value: Any) -> Any:
    """What json has no form for, in one that tells it from any other."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)):
        return {"repr": repr(value)}
    if isinstance(value, Tensor):  # numpy has no bfloat16
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value
    array = np.asarray(value)
    if array.dtype.hasobject:
        raise GraddotError(
            f"an item of the training set holds a {type(value).__name__}, of which no sample_id can be"
            " made; name an integer column of the items as id_column"
        )
    own = hashlib.blake2b(array.tobytes()).hexdigest()
    form = {"dtype": array.dtype.str, "shape": array.shape, "digest": own}
    if hasattr(value, "getpalette"):  # an image, whose numbers may stand for other colours
        form |= {"mode": value.mode, "palette": value.getpalette()}
    return form


class ColumnId:
    """The integer in a column of an item, as its sample_id."""

    def __init__(self, column: str) -> None:
        self.column = column

    def __call__(self, item: Any) -> int:
        try:
            value = item[self.column]
        except (KeyError, IndexError, TypeError) as error:
            names = ", ".join(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
            raise GraddotError(
                f"id_column is {self.column!r}, but an item of the training set has {names}"
            ) from error
        number = np.asarray(value)
        if number.ndim or number.dtype.kind not in "iu" or number > _LARGEST:
            raise GraddotError(
                f"id_column is {self.column!r}, where an item of the training set has {value!r};"
                " expected an integer of 64 bits. Without id_column the sample_id is made of all that"
                " an item holds"
            )
        return int(number)


class IndexCollator:
    """Collates the items; their indices, (N,), are one more entry of the batch, and their lengths if
    they became one row. Items without tokens are not in that.

    main is the name of the model's main input; id_of gives the index of a stream's items, which come
    without. Raises GraddotError if the items' own show that the batch's rows are in another order.
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], Any],
        main: str = "input_ids",
        id_of: Callable[[Any], int] | None = None,
    ) -> None:
        self.collate, self.main, self.id_of = collate, main, id_of

    def __call__(self, items: list[Any]) -> Any:
        if self.id_of is not None:
            items = [(self.id_of(item), item) for item in items]
        given = [item for _, item in items]
        own = _arrays(given, self.main)  # collators may change the items
        batch = self.collate(given)
        lengths = flattened_lengths([item for _, item in items], batch)
        if lengths is not None and len(items) > 1:
            batch[LENGTHS] = [n for n in lengths if n]
            items = list(itertools.compress(items, lengths))
        else:
            _check_order(own, batch.get(self.main), self.main)
        batch[INDEX] = torch.tensor([index for index, _ in items], device="cpu")
        if self.id_of is not None and LENGTHS in batch:
            # accelerate cuts a stream's batches by rows, and takes nothing but tensors.
            batch[LENGTHS], batch[INDEX] = (
                torch.tensor([batch[LENGTHS]], device="cpu"),
                batch[INDEX][None],
            )
        return batch


def _arrays(items: Sequence[Any], name: str) -> list[Tensor]:
    """What goes by this name in each of the items; none where that is no array of numbers."""
    try:
        return [torch.as_tensor(item[name]) for item in items]
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError):
        return []


def _check_order(own: Sequence[Tensor], rows: Any, name: str) -> None:
    """Raise GraddotError if every row is an item's, but not each that of its own: nothing else would
    show that a collator sorts, and sample_id would be another's. Rows that are no item's, as those of
    a collator that masks tokens, show nothing."""
    if not isinstance(rows, Tensor) or rows.dim() < 2 or len(rows) != len(own):
        return
    wrong = [i for i, row in enumerate(rows) if not _holds(row, own[i])]
    found = {i: next((j for j, x in enumerate(own) if _holds(rows[i], x)), None) for i in wrong}
    if found and None not in found.values():
        row = wrong[0]
        raise GraddotError(
            f"the collator changes the order of the items: row {row} of its {name} is that of item"
            f" {found[row]}, so that scores would go by the ids of others; let it keep the order"
        )


def _holds(row: Tensor, item: Tensor) -> bool:
    """Whether a row is an item's, filled up with one number at an end or cut off there."""
    if item.dim() != row.dim() or item.shape[1:] != row.shape[1:]:
        return False
    n = min(len(row), len(item))
    first, last = (
        (row[:n], item[:n], row[n:]),
        (row[len(row) - n :], item[len(item) - n :], row[: len(row) - n]),
    )
    return any(
        bool((part == x.to(part)).all()) and (not len(rest) or bool((rest == rest[0]).all()))
        for part, x, rest in (first, last)
    )


def with_own_generators(collator: Any) -> Any:
    """The same collator, whose own generators, if it has any, draw apart from the other's."""
    own = copy.copy(collator)
    for name, value in dict(getattr(own, "__dict__", {})).items():
        if isinstance(value, (torch.Generator, np.random.Generator, random.Random)):
            setattr(own, name, copy.deepcopy(value))
    return own
