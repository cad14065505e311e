"""Whether a Trainer's own loss is the mean over a batch's items of a loss of each item's own.

Scores of `GradDotProdTrainer(mean_of_items=True)` take it for one.
"""

import contextlib
import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import unshard
from ..errors import GraddotError
from ..sample_rows import SampleRows
from .digests import NoDropout, own_buffers, own_random
from .outputs import loss_tolerance
from .parts import splits_of
from .verify import map_tensors

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
    num_items. The loss, and its gradient at what the model returns, are compared with those of parts of
    the items, run without the others. What the model returns is moved at random for that: where it is
    still its reference's, as under DPO before the first step, all items have the same loss, and so has
    any mean of them. thorough as in `splits_of`.
    """
    items, tolerance = len(several), loss_tolerance(model)

    def run(
        part: Sequence[int], num_items: Any = num_items
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        with own_buffers(model), _outputs_of(model, several, part) as outputs:
            loss = compute(_take(inputs, part, several), num_items)
        used = outputs if loss.requires_grad else []
        grads = torch.autograd.grad(loss, used, allow_unused=True) if used else ()
        return loss.detach().double(), grads

    with own_random(), NoDropout(), torch.enable_grad(), warnings.catch_warnings():
        # What the model returns without a gradient, too, as numbers for the logs, has one here.
        warnings.filterwarnings("ignore", "Converting a tensor with requires_grad")
        whole, grads = run(range(items))
        if num_items is not None:
            without, _ = run(range(items), None)
            if (whole - without).abs() > tolerance * without.abs():
                raise GraddotError(
                    f"the loss of the batch is {float(whole):.6g} where compute_loss gets num_items_in_batch,"
                    f" the labelled tokens of the whole step, and {float(without):.6g} without. Expected with"
                    " mean_of_items=True the mean over the batch's items of a loss of each one's own,"
                    " whatever that is"
                )
        for split in splits_of(items, thorough):
            mean, same = torch.zeros_like(whole), True
            for part in split:
                loss, own = run(part)
                mean += loss * len(part) / items
                same &= _same_gradient(grads, own, part, several, tolerance)
            if same and (whole - mean).abs() <= tolerance * mean.abs():
                continue
            raise GraddotError(
                f"the loss of {items} items is {float(whole):.6g}, and the mean of those of"
                f" {len(split[1])} and the other {len(split[0])} {float(mean):.6g}"
                + ("" if same else ", with other gradients at what the model returns")
                + ". Expected with mean_of_items=True the mean over the batch's items of a loss of each"
                " one's own: one that compares items, as with a mean or running mean over the batch, or"
                " weights them by their tokens, gives no item a share of its own; nor does a collator that"
                " lays the rows in another order than a row of every item, then another of every item"
            )


def _same_gradient(
    whole: Sequence[Tensor | None],
    own: Sequence[Tensor | None],
    part: Sequence[int],
    several: SampleRows,
    tolerance: float,
) -> bool:
    """Whether the outputs of a part's items have in the loss of all the gradient that they have in
    their own, by their share."""
    share, rows = len(part) / len(several), several.rows_of(part)
    for x, y in zip(whole, own, strict=True):
        if x is None or y is None or x.shape[:1] != (several.rows,) or y.shape[:1] != (len(rows),):
            continue  # of a number, or of what has no rows
        ours, theirs = x[rows].double(), y.double() * share
        if ours.shape != theirs.shape:  # padded to another length
            continue
        if not (ours - theirs).norm() <= tolerance * (ours.norm() + theirs.norm()) + 1e-12:
            return False
    return True


@contextlib.contextmanager
def _outputs_of(
    model: nn.Module, several: SampleRows, part: Sequence[int]
) -> Iterator[list[Tensor]]:
    """Inside of it the model, on a part of the items, runs without a graph, and what it returns is moved
    by the same for a row in every part. The list has what it returned where a graph is made: leaves."""
    rows, number = several.rows_of(part), itertools.count()
    outputs: list[Tensor] = []
    enabled: list[bool] = []
    forwards = 0  # with a graph

    def moved_output(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        moved = x.detach()
        if x.shape[:1] == (len(rows),):
            random = torch.Generator().manual_seed(next(number))
            noise = torch.randn(several.rows, *x.shape[1:], generator=random, device="cpu")[
                rows
            ].to(x)
            sizes = moved.abs().where(moved.isfinite(), 0.0)
            sizes = sizes.mean(tuple(range(1, x.dim())), keepdim=True) if x.dim() > 1 else sizes
            moved = moved + noise * (1 + sizes)
        if not torch.is_grad_enabled():
            return moved
        outputs.append(moved.requires_grad_())
        return moved.clone()  # which a loss may change in place, as no leaf can be

    def before(module: nn.Module, args: Any) -> None:
        nonlocal forwards
        enabled.append(torch.is_grad_enabled())
        forwards += enabled[-1]
        if forwards > 1:
            raise GraddotError(
                "compute_loss runs the model more than once with a gradient. A step has one forward: let the"
                " collator put the rows of all items into one batch, and split what the model returns for it"
            )
        torch.set_grad_enabled(False)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        torch.set_grad_enabled(enabled.pop())
        return map_tensors(output, moved_output)

    hooks = [
        model.register_forward_pre_hook(before),
        model.register_forward_hook(after, always_call=True),
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


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
