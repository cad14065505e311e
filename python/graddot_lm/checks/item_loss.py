"""Whether a Trainer's own loss is the mean over a batch's items of a loss of each item's own.

Scores of `GradDotProdTrainer(mean_of_items=True)` take it for one.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import unshard
from ..errors import GraddotError
from ..sample_rows import SampleRows
from .mean_loss import LossOfParts, unnoticed

# What a trainer of TRL notes for its logs while it computes a loss.
_LOGS = "_metrics", "_total_train_tokens"


class ItemLoss:
    """The `compute_loss` of a `GradDotProdTrainer`, in whose place this puts itself: it is tracked."""

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._compute = trainer, trainer.compute_loss
        self._seen: set[tuple[str, int]] = set()  # what the batches checked had
        trainer.compute_loss = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        track, got = self._trainer.engine.track_loss, self._compute(*args, **kwargs)
        return (track(got[0]), *got[1:]) if isinstance(got, tuple) else track(got)

    def attach_train_batch(
        self, inputs: Mapping[str, Any], step: int, index: Tensor, num_items: Any
    ) -> None:
        """Announce a batch, checked where that is due, to the trainer's engine; index (N,) has the
        sample_id of each of its items, and num_items is the step's num_items_in_batch."""
        main = self._main_input(inputs)
        several = items_in_rows(len(main), len(index))
        self._check(inputs, several, num_items)
        self._trainer.engine.attach_train_batch(main, None, step, index, samples=several.sample_of)

    def compute_directions(
        self, batches: Iterable[Any], *, loss_scale: float = 1.0
    ) -> dict[str, Tensor]:
        """The engine's, of batches as the trainer's collator makes them."""
        under_way: list[Any] = []

        def rows() -> Iterator[Any]:
            for batch in batches:
                under_way[:] = [batch]
                main = self._main_input(batch)
                yield main, torch.ones(len(main), device=main.device)  # each item has as many

        loss = lambda model, *_: self._of(under_way[0])
        with self._own_logs():
            found: dict[str, Tensor] = self._trainer.engine.compute_directions(
                rows(), loss, loss_scale=loss_scale
            )
        return found

    def _main_input(self, inputs: Mapping[str, Any]) -> Tensor:
        name = getattr(self._trainer.model, "main_input_name", "input_ids")
        if not isinstance(inputs.get(name), Tensor):
            raise GraddotError(
                f"the batch has no {name}, in which every item has its rows, but {', '.join(inputs)}; let the"
                " collator put a row of every item there, then another of every item, and so on, and"
                " compute_loss run the model once, of all rows"
            )
        return inputs[name]  # type: ignore[no-any-return]

    def _of(self, inputs: Mapping[str, Any], num_items: Any = None) -> Tensor:
        given = {} if num_items is None else {"num_items_in_batch": num_items}
        with self._trainer.compute_loss_context_manager():
            loss: Tensor = self._compute(self._trainer.engine.model, dict(inputs), **given)
        return loss

    def _check(self, inputs: Mapping[str, Any], several: SampleRows, num_items: Any) -> None:
        trainer, model = self._trainer, self._trainer.engine.model
        forward, new = trainer.engine._forward, unseen(inputs, several, self._seen)
        due = torch.tensor([forward.is_first or bool(new)], device=trainer.args.device)
        if trainer.args.world_size > 1:  # for a loss may ask the other processes
            due = trainer.accelerator.gather(due)
        self._seen |= new
        if due.any():
            with forward.set_aside(), self._own_logs():
                check_mean_of_items(model, self._of, inputs, several, forward.thorough, num_items)
                unshard(model)

    @contextlib.contextmanager
    def _own_logs(self) -> Iterator[None]:
        """Inside of it what is noted for the logs is not of training."""
        own = vars(self._trainer)
        kept = {name: copy.deepcopy(own[name]) for name in _LOGS if name in own}
        try:
            yield
        finally:
            own.update(kept)


def items_in_rows(rows: int, items: int) -> SampleRows:
    """The rows of a batch as collators of preferences lay them: one of every item, such as the chosen
    texts, then another of every item, and so on."""
    if not items or rows % items:
        raise GraddotError(
            f"the collator made {rows} rows of {items} dataset items; expected a row of every item, then"
            " another of every item, and so on, as TRL's collators of preferences lay them"
        )
    return SampleRows(torch.arange(rows, device="cpu") % items)


def unseen(
    inputs: Mapping[str, Any], several: SampleRows, known: set[tuple[str, int]]
) -> set[tuple[str, int]]:
    """What a batch has, beside what is known, without which a loss may look like a mean of items': several
    items at all, and masks and labels (rows, T) that differ in their sums, or numbers, from item to item
    (where none does, weights by token are not to be seen), and in which of an item's rows."""
    kinds = range(several.rows // len(several))
    found = {("items", 0)} if len(several) > 1 else set()
    for name, x in inputs.items():
        if not isinstance(x, Tensor) or x.dim() != 2 or len(x) != several.rows:
            continue
        if ("mask" in name or "label" in name) and {(name, k) for k in kinds} - known:
            marked = x if "mask" in name else x != -100
            sums = marked.sum(1).view(-1, len(several))
            found |= {(name, k) for k in (sums != sums[:, :1]).any(1).nonzero().flatten().tolist()}
    return found - known


def check_mean_of_items(
    model: nn.Module,
    compute: Callable[[dict[str, Any], Any], Tensor],
    inputs: Mapping[str, Any],
    several: SampleRows,
    thorough: bool,
    num_items: Any = None,
) -> None:
    """Raise GraddotError unless the loss of a batch is the mean of those of its items.

    compute(inputs, num_items) runs the model and gives the loss of a batch, which is not to depend on
    num_items. What the model returns is moved at random: where it is still its reference's, as under DPO
    before the first step, all items have the same loss, and so has any mean of them. thorough as in
    `splits_of`.
    """
    items = len(several)

    def losses(num_items: Any) -> LossOfParts:
        loss_of = lambda which: compute(_take(inputs, which, several), num_items)
        return LossOfParts(model, loss_of, several, lambda which: len(which) / items, moved=True)

    parts = losses(num_items)
    with unnoticed():
        if num_items is not None:
            (whole, _), (without, _) = parts.run(range(items)), losses(None).run(range(items))
            if not parts.same(whole, without):
                raise GraddotError(
                    f"the loss of the batch is {float(whole):.6g} where compute_loss gets num_items_in_batch,"
                    f" the labelled tokens of the whole step, and {float(without):.6g} without. Expected with"
                    " mean_of_items=True the mean over the batch's items of a loss of each one's own,"
                    " whatever that is"
                )
        difference = parts.difference(thorough)
    if difference is not None:
        some, others = map(len, difference.parts[::-1])
        raise GraddotError(
            f"the loss of {items} items is {difference.whole:.6g}, and the mean of those of {some} and the"
            f" other {others} {difference}. Expected with mean_of_items=True the mean over the batch's items"
            " of a loss of each one's own: one that compares items, as with a mean or running mean over the"
            " batch, or weights them by their tokens, gives no item a share of its own; nor does a collator"
            " that lays the rows in another order than a row of every item, then another of every item"
        )


def _take(inputs: Mapping[str, Any], which: Sequence[int], several: SampleRows) -> dict[str, Any]:
    """A batch of some of its items: of tensors with a row of every row, or one of every item."""
    by_rows, by_items = several.rows_of(which), sorted(which)

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim():
            return x
        if len(x) == several.rows:
            return x[by_rows]
        return x[by_items] if len(x) == len(several) else x

    return {name: one(x) for name, x in inputs.items()}
