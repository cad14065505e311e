"""Samples of several rows each, as the chosen and the rejected text of a preference pair.

A sample's gradient is the sum of its rows', and so is its dot: no layer has to know which rows
belong together. Only the loss does, the mean over samples of each one's own.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import GraddotError


class SampleRows:
    """Which sample each row of a batch belongs to, (rows,), numbered from 0 to N - 1."""

    def __init__(self, sample_of: Sequence[int] | Tensor) -> None:
        of = torch.as_tensor(sample_of, device="cpu").detach()
        if of.dim() != 1 or not of.numel() or of.is_floating_point() or of.dtype == torch.bool:
            raise GraddotError(
                f"samples have shape {tuple(of.shape)} and dtype {of.dtype}; expected for each row of the"
                " batch the number of its sample, (rows,) whole numbers"
            )
        self.sample_of = of.long()
        found = self.sample_of.unique()
        if int(found[0]) < 0 or int(found[-1]) >= len(found):
            raise GraddotError(
                f"samples are numbered {found[:8].tolist()}{' …' if len(found) > 8 else ''};"
                " expected 0 to N - 1, in the order of batch_idx, each with at least one row"
            )
        self._number = len(found)
        self._on: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return self._number

    @property
    def rows(self) -> int:
        return len(self.sample_of)

    def sum(self, by_row: Tensor) -> Tensor:
        """(..., rows) summed over the rows of each sample, (..., N)."""
        sums = by_row.new_zeros(*by_row.shape[:-1], len(self))
        if by_row.device not in self._on:
            # A copy from memory that is not pinned would wait for what the GPU is doing.
            own = self.sample_of.pin_memory() if by_row.is_cuda else self.sample_of
            self._on[by_row.device] = own.to(by_row.device, non_blocking=True)
        return sums.index_add(-1, self._on[by_row.device], by_row)

    def rows_of(self, which: Sequence[int]) -> list[int]:
        """The rows of some of the samples, in the batch's order."""
        kept = torch.zeros(len(self), dtype=torch.bool, device="cpu")
        kept[list(which)] = True
        return list(itertools.compress(range(self.rows), kept[self.sample_of].tolist()))
