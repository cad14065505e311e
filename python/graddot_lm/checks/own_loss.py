"""Whether a loss of the caller's own is the mean over the labelled tokens of all rows, where that shows.

Scores take it for one: a sample's part of it is told from the numbers of labelled tokens alone.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import GraddotError
from ..sample_rows import SampleRows
from .parts import splits_of

_SURELY_A_SUM = 4  # tokens of weight 1: of fewer it may be a factor that the loss has
# Where the autograd functions of PyTorch's communication are; as of torch 2.13 some have names instead.
_COMMUNICATION = ("torch.distributed.nn", "torch.distributed._functional_collectives")
AT_MOST = 2**22  # numbers that a look may cost: it is at what a batch has of it, not at all logits
AT_ONCE = 2**19  # of them in float64
_MEAN = 1  # PyTorch's number for reduction="mean"


class ForwardSpan:
    """Which nodes of the graph were made in a step's forward, and which in the checks before it."""

    def __init__(self) -> None:
        """The checks begin."""
        self._checks, self._known = _now(), set[tuple[Any, int]]()
        self._begin = self._end = 0

    def begin(self) -> None:
        self._begin = _now()

    def end(self, judged: Iterable[Tensor]) -> None:
        """judged is what the model returns, and the numbers that it keeps in attributes."""
        self._end = _now()
        self._known = {(x.grad_fn, x.output_nr) for x in judged if x.grad_fn is not None}

    def check(self, loss: Tensor) -> None:
        """Raise GraddotError if a loss is made of what the checks left somewhere, or of a number that
        the forward made, of which is not known whether it is one of its rows."""
        stack, seen = [(loss.grad_fn, loss.output_nr)], set()
        while stack:
            edge = node, k = stack.pop()
            if node is None or edge in seen:
                continue
            seen.add(edge)
            made = node._sequence_nr()
            if self._checks <= made < self._begin:
                raise GraddotError(
                    "the loss passed to track_loss is made of what the model computed when the engine ran"
                    " it on parts of the batch, as its first step does, which a list outside of the model"
                    " keeps, too; return it from the model, or keep it in a module's attribute"
                )
            if not self._begin <= made < self._end:
                stack += node.next_functions
            elif edge not in self._known and not len(node._input_metadata[k].shape):
                raise GraddotError(
                    f"the loss passed to track_loss is made of a number ({node.name()}) that the model's"
                    " forward computed, but neither returned nor kept in a module's attribute, so that it"
                    " cannot be seen whether every row has a part of its own in it; return it"
                )


def _now() -> int:
    """What nodes made later have a larger sequence number than, or the same."""
    return torch.ones((), requires_grad=True, device="cpu").clone().grad_fn._sequence_nr()  # type: ignore[no-any-return,union-attr]


def check_samples_apart(
    loss: Tensor, outputs: Sequence[Tensor], thorough: bool, several: SampleRows | None = None
) -> None:
    """Raise GraddotError if a loss compares samples, as one with the others of the batch as negatives,
    or with those of other processes.

    outputs, (rows, ...) each, are those of the model that it is made of. Where a loss is a sum over
    rows, its gradient of some rows' outputs does not change with others'. One that cannot be
    differentiated twice, or has a backward of its own, is not judged; nor is one of so many outputs
    that this would cost memory. thorough as in `splits_of`; several are the samples if they have more than
    a row each.
    """
    ends = {x.grad_fn for x in outputs} - {None}
    nodes = _between(loss.grad_fn, ends)
    if any(map(_gathers, nodes)):
        raise GraddotError(
            "the loss passed to track_loss is made of what the model returned in other processes, too,"
            " through communication with a gradient, as with negatives of all processes. No sample has"
            " a loss of its own then; make it of what the model returns in this process"
        )
    # An autograd function written in Python may not bear to run twice.
    own_backward = any(isinstance(n, torch.autograd.function.BackwardCFunction) for n in nodes)
    if not outputs or sum(x.numel() for x in outputs) > AT_MOST or own_backward:
        return
    rows = len(outputs[0])
    random = torch.Generator(loss.device).manual_seed(0)
    probes = [torch.randn(x.shape, generator=random, device=loss.device).to(x) for x in outputs]
    try:
        grads = torch.autograd.grad(loss, outputs, create_graph=True, allow_unused=True)
        used = [(x, g, r) for x, g, r in zip(outputs, grads, probes, strict=True) if g is not None]
        for split in splits_of(len(several or outputs[0]), thorough):
            part, rest = split if several is None else map(several.rows_of, split)
            moved = sum((g[part] * r[part]).sum() for _, g, r in used)
            if not isinstance(moved, Tensor) or not moved.requires_grad:
                return  # a loss that is linear in them
            curved = torch.autograd.grad(
                moved, [x for x, _, _ in used], retain_graph=True, allow_unused=True
            )
            own, others = (
                torch.stack([c[rows].double().square().sum() for c in curved if c is not None])
                for rows in (part, rest)
            )
            if others.sum() > 1e-8 * own.sum():
                break
        else:
            return
    except RuntimeError:  # not twice
        if not any(_compares_pairs(node, ends, rows) for node in nodes):
            return
        raise GraddotError(
            "the loss passed to track_loss compares samples: it is made of distances between the"
            f" {rows} rows of the batch (torch.cdist, F.pdist), as with negatives from the batch. No"
            " sample has a loss of its own then, and validation rows that ride along would be compared"
            " with training rows"
        ) from None
    raise GraddotError(
        "the loss passed to track_loss compares samples: its gradient at what the model returns for some"
        f" of the {rows} rows of the batch changes with what it returns for others, as with negatives"
        " from the batch or a function of the whole mean. No sample has a loss of its own then, and"
        " validation rows that ride along would be compared with training rows"
    )


def _between(start: Any, ends: set[Any]) -> list[Any]:
    """The nodes of the graph from one of them to the ends, or to the leaves where there are none."""
    found, stack = [], [start]
    seen = {*ends, *stack}
    while stack:
        if (node := stack.pop()) is None:
            continue
        found.append(node)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return found


def ignored_labels(loss: Tensor) -> set[int]:
    """The labels that PyTorch's cross-entropies in a loss ignore, as they keep them for the backward."""
    kept = [getattr(n, "_saved_ignore_index", None) for n in _between(loss.grad_fn, set())]
    # It comes without a sign.
    return {x - 2**64 if x >= 2**63 else x for x in kept if x is not None}


def check_class_weights(loss: Tensor, samples: int) -> None:
    """Raise GraddotError if a loss is made of PyTorch's cross-entropies over several samples that divide by
    the weights of all their labels' classes. A weight of 0 leaves a class out."""
    divided = 0
    for node in _between(loss.grad_fn, set()):
        if node.name().startswith("NllLoss") and node._saved_weight is not None:
            used = node._saved_weight[node._saved_weight != 0]
            is_mean = node._saved_reduction == _MEAN and used.numel() > 0
            divided += is_mean and bool(used.min() != used.max())
    if 0 < divided < samples:
        raise GraddotError(
            "the loss passed to track_loss is a cross-entropy with weights of classes, divided by those of all"
            f" labels of the batch, so that none of its {samples} samples has a loss of its own. Divide the sum"
            ' (reduction="sum") by the number of labelled tokens, whatever the weights'
        )


def _compares_pairs(node: Any, ends: set[Any], rows: int) -> bool:
    """Whether it is a distance, which cannot be differentiated twice, of all of these rows, or all of one
    half and of the other: each side made of what the ends are."""
    shape = tuple(node._input_metadata[0].shape)
    if node.name().startswith("PdistBackward"):
        return shape in {(n * (n - 1) // 2,) for n in (rows, rows // 2)}
    if not node.name().startswith("CdistBackward"):
        return False
    sides = [side for side, _ in node.next_functions[:2]]
    of_rows = math.prod(shape[:-2]) == 1 and shape[-2:] in {(n, n) for n in (rows, rows // 2)}
    return of_rows and all(_reaches(side, ends) for side in sides)


def _reaches(node: Any, ends: set[Any]) -> bool:
    before = (following for one in _between(node, ends) for following, _ in one.next_functions)
    return node in ends or any(following in ends for following in before)


def _gathers(node: Any) -> bool:
    """Whether it is of PyTorch's communication with a gradient, of more than a number: losses of
    processes may be averaged."""
    function = getattr(type(node), "_forward_cls", None)
    module = getattr(function, "__module__", "")
    if not module.startswith(_COMMUNICATION) and "_c10d_functional" not in node.name():
        return False
    return any(len(x.shape) > 0 for x in node._input_metadata)


def sums_of_rows(loss: Tensor) -> list[Any]:
    """The nodes of a loss that make (rows,), the sum over each row's labels: PyTorch's CTC losses."""
    return [n for n in _between(loss.grad_fn, set()) if "CtcLossBackward" in n.name()]


class RowWeights:
    """What the tokens of each row weigh in a loss, by its gradient at the rows' sums, (rows,)."""

    def __init__(self, grad: Tensor) -> None:
        used = grad != 0
        self._shape, self.tolerance = grad.shape, _tolerance(grad.dtype)
        self.known = bool(used.any())
        self._by_row = grad.double().masked_fill(~used, math.nan)
        self._weight = self._by_row[used]

    def check(self, counts: Tensor, n: int, factor: Tensor) -> None:
        """Raise GraddotError if they differ, and add up to 1 over all rows or over training rows, the
        first n, and validation rows each, or to the same in every row; or as `EqualWeights`. counts
        (rows,) are labelled tokens."""
        if not self.known:
            return
        low, high = (x / factor.to(self._weight.device) for x in self._weight.aminmax())
        if not high - low > self.tolerance * high.abs():
            EqualWeights(self._weight.mean(), self._shape, self.tolerance).check(counts, factor)
            return
        weights = self._by_row / factor.to(self._by_row.device)
        sums = torch.where(counts > 0, counts * weights, 0.0).to(weights)
        is_one = lambda x: bool((x - 1).abs() < self.tolerance / 20)
        if is_one(sums.sum()):
            what = "add up to one, as in a mean of rows' own means or one with weights of classes"
        elif n < len(sums) and is_one(sums[:n].sum()) and is_one(sums[n:].sum()):
            what = "add up to one over training and validation rows each, as in a sum of two means"
        elif self._same_in_all(sums, counts):
            what = "add up to the same in every row, as in a mean of rows' own means times a factor"
        else:
            return  # weights that have nothing to do with the rest of the batch
        raise GraddotError(
            f"the labelled tokens of the batch weigh {float(low):.4g} to {float(high):.4g} in the loss"
            f" passed to track_loss, and {what}. Expected the mean over the labelled tokens of all"
            " rows. Divide a sum with weights by their number, whatever the weights; for the mean of"
            " rows' own means give the engine labels of one number a row, so that each counts once"
        )

    def _same_in_all(self, sums: Tensor, counts: Tensor) -> bool:
        """Whether rows with different numbers of labelled tokens have the same sum of weights, other than
        weights by their length would have, of a sum divided by the number of labelled tokens."""
        counts = counts.to(sums.device)
        told = (counts > 0) & sums.isfinite()
        if not told.any():
            return False
        fewest, most = counts[told].aminmax()
        low, high = sums[told].abs().aminmax()
        alike = high - low <= self.tolerance / 10 * high
        divided = (high * counts.sum() - 1).abs() < self.tolerance / 10
        return bool((fewest < most) & alike & ~divided)


class TokenWeights(RowWeights):
    """What the tokens of each row weigh in a cross-entropy, by the gradient at its logits.

    There it is w · (p − y) for a token of weight w, of which p, softmax of the logits, is known, and y
    is the class whose gradient is negative; with label smoothing ε it is w · (p − (1 − ε) y − ε/C).
    """

    def __init__(self, logits: Tensor, grad: Tensor, used: Tensor) -> None:
        """logits and grad (rows, T, C); used (rows, T), where grad is not 0. Where there are many
        classes, a few of a row's tokens are looked at."""
        rows, _, classes = grad.shape
        self._shape = grad.shape[:2]
        each = max(1, AT_MOST // (rows * classes))
        number = used.sum(1, keepdim=True)
        every = ((number + each - 1) // each).clamp(min=1)
        row, at = (used & (used.cumsum(1) % every == 0)).nonzero().unbind(1)
        # In float64, which of all would be the step's peak of memory in a small model.
        indices = [x.split(max(1, AT_ONCE // classes)) for x in (row, at)]
        pieces = [_Piece(logits, grad, *piece) for piece in zip(*indices, strict=True)]
        self.tolerance = _tolerance(grad.dtype)
        fits = []
        for smoothing in (0.0, max(piece.smoothing() for piece in pieces)[1]):
            parts = zip(*(piece.fit(smoothing) for piece in pieces), strict=True)
            weight, size, off = (torch.cat(part) for part in parts)
            # What is predicted with all but certainty has a gradient that is mostly rounding.
            told = size > self.tolerance
            fits.append((float(off[told].amax()) if told.any() else math.inf, weight, told))
        # A smoothing that fits little better is of rounding.
        off_by, weight, told = fits[fits[1][0] < fits[0][0] / 2]
        self.known = off_by <= self.tolerance
        self._weight, row = weight[told], row[told]
        number = torch.bincount(row, minlength=rows)
        total = self._weight.new_zeros(rows).index_add_(0, row, self._weight)
        self._by_row = total / number  # NaN of a row of which nothing is told


class EqualWeights:
    """What all labelled tokens, or rows, weigh in a loss: refused if as in a sum, or in one divided by another
    number than that of the labelled tokens, of which rows have different ones."""

    def __init__(self, weight: Tensor, shape: Sequence[int], tolerance: float) -> None:
        """shape (rows, ...) of what has these weights."""
        rows, numbers = shape[0], math.prod(shape)
        self._weight, self._tolerance = weight.double(), tolerance
        # Shifted labels have a token less.
        divisors = [rows, numbers, numbers - rows] if len(shape) > 1 else [rows]
        self._divisors = [n for n in divisors if n]

    @classmethod
    def of(cls, grad: Tensor) -> "EqualWeights | None":
        """By the gradient at losses of rows or tokens, which are what it is not 0 at; None if it differs."""
        tolerance = _tolerance(grad.dtype)
        found = grad[grad != 0].double()
        if not found.numel():
            return None
        low, high = found.aminmax()
        alike = bool(high - low <= tolerance * torch.maximum(low.abs(), high.abs()))
        return cls(found.mean().abs(), grad.shape, tolerance) if alike else None

    def check(self, counts: Tensor, factor: Tensor) -> None:
        """Raise GraddotError; counts (rows,) are labelled tokens."""
        weight = float(self._weight / factor.abs().to(self._weight.device))
        labelled = int(counts.sum())
        is_one = lambda x: abs(x - 1) < self._tolerance / 20
        if is_one(weight * labelled):
            return
        if labelled >= _SURELY_A_SUM and is_one(weight):
            problem = (
                "as in a sum. Divide it by their number, or pass the engine loss_reduction='sum'; where it is a"
                " sum of rows' own means, with labels of one number a row"
            )
        elif any(is_one(weight * n) for n in self._divisors) and counts.min() != counts.max():
            problem = (
                "as in a sum, or of rows' own means, divided by the number of rows or of all tokens, labelled"
                " or not. Expected the mean over the labelled tokens of all rows: divide a sum over them by"
                " their number; or give the engine labels of one number a row (label_shift=0), so that each"
                " row counts once"
            )
        else:  # a factor that the loss has
            return
        raise GraddotError(
            f"of {labelled} labelled tokens in {len(counts)} rows, each token or row weighs {weight:.4g} in the"
            f" loss passed to track_loss, {problem}"
        )


def _tolerance(dtype: torch.dtype) -> float:
    return 0.1 if torch.finfo(dtype).bits == 16 else 1e-3


class _Piece:
    """Some tokens' logits z and gradients g there, (M, C), read in float64 for every question."""

    def __init__(self, logits: Tensor, grad: Tensor, row: Tensor, at: Tensor) -> None:
        self._logits, self._grad, self._at = logits, grad, (row, at)

    def _read(self) -> tuple[Tensor, Tensor, Tensor]:
        """p, softmax of z; g; and the label, (M, 1)."""
        z, g = (x[self._at].double() for x in (self._logits, self._grad))
        return z.softmax(-1), g, g.argmin(-1, keepdim=True)

    def smoothing(self) -> tuple[float, float]:
        """How well it shows, and the ε of label smoothing, which all tokens have, by the one where it
        shows best: at classes that are no label g is w · p − w · ε/C, a line through p. 0 where it
        is no such number."""
        p, g, label = self._read()
        if not p.numel() or p.shape[1] < 3:
            return 0.0, 0.0
        others = torch.ones_like(p).scatter_(1, label, 0.0)
        mean = lambda x: (x * others).sum(1, keepdim=True) / (p.shape[1] - 1)
        centred = (p - mean(p)) * others
        spread = centred.square().sum(1, keepdim=True)
        slope = (centred * g).sum(1, keepdim=True) / spread
        found = (p.shape[1] * (mean(p) - mean(g) / slope))[spread.argmax(), 0].item()
        return spread.max().item(), found if 0 < found < 1 else 0.0

    def fit(self, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of every token, (M,): its weight; the norm of what g is that weight times; and how far g is
        from it, relative."""
        d, g, label = self._read()
        d -= smoothing / d.shape[1]
        d.scatter_add_(1, label, torch.full_like(label, smoothing - 1, dtype=d.dtype))
        size = d.norm(dim=-1)
        weight = (g * d).sum(-1) / size.square()
        off = (g - weight[:, None] * d).norm(dim=-1) / g.norm(dim=-1)
        return weight, size, off
