"""Whether the loss of a batch is made of those that its samples have alone, by running some of them alone."""

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import GraddotError
from ..sample_rows import SampleRows
from .digests import NoDropout, own_buffers, own_random
from .outputs import loss_tolerance
from .parts import splits_of
from .verify import map_tensors

Which = Sequence[int]  # numbers of samples


class Difference(NamedTuple):
    """Between the loss of all samples and what those of two parts of them, run alone, make."""

    parts: tuple[Which, Which]
    whole: float
    made: float
    gradients: bool  # whether those at what the model returns differ, too

    def __str__(self) -> str:
        return f"{self.made:.6g}" + (
            ", with other gradients at what the model returns" if self.gradients else ""
        )


class LossOfParts:
    """The loss of some of a batch's samples, the model run without a graph, and its gradient at what that
    returns. To be used inside of `unnoticed`."""

    def __init__(
        self,
        model: nn.Module,
        loss_of: Callable[[Which], Tensor],
        several: SampleRows,
        share: Callable[[Which], float],
        moved: bool,
    ) -> None:
        """loss_of runs the model, once; share is what a part's loss counts for in that of all; moved, what
        the model returns is moved at random, a row's the same in every part."""
        self._model, self._loss_of, self._several, self._share = model, loss_of, several, share
        self._moved, self.tolerance = moved, loss_tolerance(model)

    def run(self, which: Which) -> tuple[Tensor, Sequence[Tensor | None]]:
        with own_buffers(self._model), self._outputs(self._several.rows_of(which)) as outputs:
            loss = self._loss_of(which)
        used = outputs if loss.requires_grad else []
        grads = torch.autograd.grad(loss, used, allow_unused=True) if used else ()
        return loss.detach().double(), grads

    def same(self, one: Tensor, other: Tensor) -> bool:
        return bool((one - other).abs() <= self.tolerance * other.abs())

    def difference(self, thorough: bool = True) -> Difference | None:
        """The first that is found, if any; thorough as in `splits_of`."""
        samples = range(len(self._several))
        whole, grads = self.run(samples)
        for split in splits_of(len(samples), thorough):
            made, alike = torch.zeros_like(whole), True
            for part in split:
                if share := self._share(part):  # a mean of nothing is no number
                    loss, own = self.run(part)
                    made += loss * share
                    alike &= self._same_gradient(grads, own, part, share)
            if not (alike and self.same(whole, made)):
                return Difference(split, float(whole), float(made), not alike)
        return None

    def _same_gradient(
        self,
        whole: Sequence[Tensor | None],
        own: Sequence[Tensor | None],
        part: Which,
        share: float,
    ) -> bool:
        """Whether the outputs of a part's samples have in the loss of all the gradient that they have in
        their own, by its share."""
        rows = self._several.rows_of(part)
        for x, y in zip(whole, own, strict=True):
            if x is None or y is None or x.shape[:1] != (self._several.rows,):
                continue  # of a number, or of what has no rows
            if y.shape[:1] != (len(rows),):
                continue
            ours, theirs = x[rows].double(), y.double() * share
            if ours.shape != theirs.shape:  # padded to another length
                continue
            size = ours.norm() + theirs.norm()
            if not (ours - theirs).norm() <= self.tolerance * size + 1e-12:
                return False
        return True

    @contextlib.contextmanager
    def _outputs(self, rows: Sequence[int]) -> Iterator[list[Tensor]]:
        """Inside of it the model runs on these rows without a graph. The list has what it returned where
        one is made: leaves."""
        number = itertools.count()
        outputs: list[Tensor] = []
        enabled: list[bool] = []
        forwards = 0  # with a graph

        def as_leaf(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            leaf = x.detach()
            if self._moved and x.shape[:1] == (len(rows),):
                leaf = leaf + self._noise(leaf, rows, next(number))
            if not torch.is_grad_enabled():
                return leaf
            outputs.append(leaf.requires_grad_())
            return leaf.clone()  # which a loss may change in place, as no leaf can be

        def before(module: nn.Module, args: Any) -> None:
            nonlocal forwards
            enabled.append(torch.is_grad_enabled())
            forwards += enabled[-1]
            if forwards > 1:
                raise GraddotError(
                    "the loss runs the model more than once with a gradient. A step has one forward: put"
                    " the rows of all samples into one batch, as by the collator, and split what the model"
                    " returns for it"
                )
            torch.set_grad_enabled(False)

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            torch.set_grad_enabled(enabled.pop())
            return map_tensors(output, as_leaf)

        hooks = [
            self._model.register_forward_pre_hook(before),
            self._model.register_forward_hook(after, always_call=True),
        ]
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()

    def _noise(self, x: Tensor, rows: Sequence[int], seed: int) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        noise = torch.randn(self._several.rows, *x.shape[1:], generator=random, device="cpu")
        sizes = x.abs().where(x.isfinite(), 0.0)
        sizes = sizes.mean(tuple(range(1, x.dim())), keepdim=True) if x.dim() > 1 else sizes
        return noise[rows].to(x) * (1 + sizes)


@contextlib.contextmanager
def unnoticed() -> Iterator[None]:
    """Inside of it losses have no dropout and the same noise in every row and run, and training does not
    miss what is drawn at random."""
    with own_random(), NoDropout(), torch.enable_grad(), warnings.catch_warnings():
        # What the model returns without a gradient, too, as numbers for the logs, has one here.
        warnings.filterwarnings("ignore", "Converting a tensor with requires_grad")
        yield


def check_loss_of_tokens(
    model: nn.Module, loss_of: Callable[[Which], Tensor], counts: Tensor, reduction: str
) -> None:
    """Raise GraddotError unless a batch's loss is the mean, or sum, over its labelled tokens of losses
    that have nothing to do with other rows. loss_of(rows) runs the model on some of them, once; counts
    (rows,) are labelled tokens."""
    rows, tokens = range(len(counts)), counts.double().cpu()
    if rows.stop < 2 or not (tokens > 0).sum() > 1:
        raise GraddotError(
            f"the batch has {len(rows)} rows, {int((tokens > 0).sum())} of them with labelled tokens; two at"
            " least are needed to see whether each has a loss of its own"
        )
    mean = reduction == "mean"
    share = lambda which: float(tokens[list(which)].sum() / tokens.sum()) if mean else 1.0
    parts = LossOfParts(model, loss_of, SampleRows(rows), share, moved=False)
    with unnoticed():
        difference = parts.difference()
        if difference is None:
            return
        (first, _), (again, _) = parts.run(rows), parts.run(rows)
    if not parts.same(first, again):
        raise GraddotError(
            f"the loss of one batch is {float(first):.6g} and then {float(again):.6g}: NaN, or made of random"
            " numbers of a generator of its own. Let loss_fn draw the same for a row each time"
        )
    some, others = map(len, difference.parts[::-1])
    made_of = "the mean by labelled tokens of those" if mean else "the sum of those"
    raise GraddotError(
        f"the loss of {len(rows)} rows is {difference.whole:.6g}, and {made_of} of {some} and the other"
        f" {others} {difference}. Expected the {reduction} over the labelled tokens of all rows of losses that"
        " have nothing to do with other rows. One that compares rows, or divides or weights by what others"
        " have (their positives, classes, lengths), gives no sample a loss of its own; a sum with weights is"
        " to be divided by the number of labelled tokens"
    )
