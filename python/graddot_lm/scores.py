"""From the raw dots of a step's micro-batches to scores, values and rows of the store."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batches import LossForm
from .errors import GraddotError
from .loss_scale import LossScale
from .sample_rows import SampleRows
from .segments import Segments
from .step import Step

# A number, or a 0-dim tensor, which may be on a device that is not to be waited for.
Number = float | Tensor


class Norms(NamedTuple):
    """Gradient norms of a micro-batch, fp64."""

    samples: Tensor  # (N,), ‖∇L_i‖
    targets: Tensor  # (K,), ‖∇L_val‖
    cosines: Tensor  # (K, N)


@dataclass
class MicroBatch:
    """What one `attach_train_batch` leaves until its scores are read."""

    step: Step
    iteration: int
    sample_ids: Any
    labels: Tensor  # (rows, ...) of the joint batch
    leaf_of: dict[str, str]  # by parameter name
    dots_shape: tuple[int, int]  # of the raw dots and squared norms that the step collects
    loss_scale: LossScale
    loss_reduction: str
    # Labelled tokens, (rows,), or (N,) of a packed row's samples; 1 for each sample of several rows.
    counts: Tensor
    direction_norms: Tensor | None = None  # (K,) of given directions, for `norms`
    n_train: Tensor | None = None  # 0-dim: training tokens of all processes, as they are weighted
    items: Number | None = None  # what a summed loss was divided by: num_items_in_batch
    world: int = 1  # processes over which gradients are averaged
    # What a GradScaler multiplied the loss by, where that is known, beside the caller's factor.
    unit: Number | None = None
    # Rows that `padding` filled up: which, their own length and that of the joint batch.
    filled: list[tuple[list[int], int, int]] = field(default_factory=list)
    segments: Segments | None = None  # the samples of the batch's one row, if it is packed
    several: SampleRows | None = None  # which rows are of which sample, if some have several
    forwarded: bool = False
    versions: list[int] = field(default_factory=list)  # of the scored weights when it began
    # Whether each optimizer took the step; a 0-dim tensor where only the device knows.
    applied: list[bool | Tensor] = field(default_factory=list)
    optimizer_of: dict[str, int] = field(default_factory=dict)  # by leaf
    lr: Number = float("nan")
    leaf_lrs: dict[str, Number] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Training samples."""
        parts = self.segments or self.several
        return self.step.train_rows if parts is None else len(parts)

    def judged(self, name: str) -> bool:
        """Whether it matters by what layer a parameter is used. Of one that is not scored the gradient is
        right anyhow, unless there are validation rows, which are no part of it."""
        return name in self.leaf_of or bool(self.step.val_rows)

    @property
    def leaves(self) -> list[str]:
        """All leaves, in an order that runs repeat."""
        return list(dict.fromkeys(self.leaf_of.values()))

    def labelled(self, loss: LossForm, shift: int) -> Tensor:
        """Labelled tokens of each sample, as `counts`, for a loss that shifts the labels so."""
        if self.several is not None:
            return torch.ones(len(self.several), dtype=torch.long, device=self.labels.device)
        if self.segments is None:
            return loss.count(self.labels, shift)
        return self.segments.count(self.labels, shift, loss.ignore_index)

    def summed(self, by_token: Tensor) -> Tensor:
        """(rows, T) summed over the tokens of each sample, as `counts`."""
        return by_token.sum(1) if self.segments is None else self.segments.sum(by_token[0].long())

    def set_counts(self, counts: Tensor, world: int = 1, n_train: Tensor | None = None) -> None:
        """Labelled tokens of each sample, as `counts`; with them the scale of the training gradient.

        The gradient is averaged over `world` processes. A training token's weight there is
        1 / n_train, by default that of a mean over processes of means.
        """
        self.counts = counts
        self.step.counts = counts if self.several is None else counts.new_ones(self.step.rows)
        self.world = world
        n_train = counts[: self.n].sum() * world if n_train is None else n_train
        self.n_train = n_train.clamp(min=1).double()
        scale = counts.new_ones((), dtype=torch.float64)
        if self.loss_reduction == "mean":
            scale = world * counts.sum().to(n_train.device) / self.n_train
        self.step.scale.copy_(scale)

    def token_weights(self) -> Tensor:
        """Of each sample's mean loss in this batch's own, averaged over processes, (N,)."""
        tokens = self.counts[: self.n].double()
        if self.loss_reduction == "mean":
            assert self.n_train is not None
            return tokens / self.n_train.to(tokens.device)
        return tokens / ((1 if self.items is None else self.items) * self.world)

    def _normalised(self, leaf: str) -> Tensor:
        """A leaf's raw dots of the joint loss as ⟨∇L_val, ∇L_i⟩ of the mean losses, (K, N, T).

        T is 1 unless tokens are scored by themselves.
        """
        raw = self._raw(leaf)
        if self.step.norms:
            raw = raw[:-1, : self.n]
        samples, targets = self._factors()
        dots = raw.reshape(len(raw), self.n, -1) * samples[:, None]
        # A given direction is a gradient of a mean loss already.
        return dots if targets is None else dots * targets[:, None, None]

    def _raw(self, leaf: str) -> Tensor:
        dots, scale = self.step.collected(leaf), self.step.scale
        if dots is None:
            dots = scale.new_zeros(self.dots_shape, dtype=torch.float64)
        parts = self.segments or self.several
        return dots if parts is None else parts.sum(dots)

    def _factors(self) -> tuple[Tensor, Tensor | None]:
        """What turns gradients of the joint loss into those of mean losses: for each training
        sample, (N,), and for each target whose rows ride along, (K,)."""
        counts = self.counts.to(self.step.scale.device, torch.float64)
        divisor = counts.sum() if self.loss_reduction == "mean" else self.items
        divisor = 1.0 if divisor is None else divisor
        divisor = divisor / self.loss_scale.factor()
        samples, targets = divisor / counts[: self.n].clamp(min=1), None
        if self.step.val_rows:
            groups = torch.split(counts[self.n :], self.step.val_rows)
            targets = divisor / torch.stack([c.sum() for c in groups])
        return samples, targets

    def dots(self, leaf: str) -> Tensor:
        """A leaf's part of the scores, (K, N)."""
        return self._normalised(leaf).sum(2)

    def token_scores(self) -> Tensor:
        """The sum over leaves by token, (K, N, T)."""
        return torch.stack([self._normalised(leaf) for leaf in self.leaves]).sum(0)

    def scores(self) -> Tensor:
        """The sum over leaves, (K, N)."""
        return torch.stack([self.dots(leaf) for leaf in self.leaves]).sum(0)

    def norms(self) -> Norms:
        """Norms over all leaves, and the cosines of the scores: 0 where the score is."""
        raw = torch.stack([self._raw(leaf) for leaf in self.leaves]).sum(0)
        factors, target_factors = self._factors()
        # A cross term of a shared weight may be negative, and a sum of nearly 0 be rounded below it.
        samples = raw[-1, : self.n].clamp(min=0).sqrt() * factors.abs()
        if target_factors is None:
            assert self.direction_norms is not None
            targets = self.direction_norms.to(raw.device)
        else:
            targets = raw[:-1, self.n].clamp(min=0).sqrt() * target_factors.abs()
        dots = self.scores()
        cosines = torch.where(dots == 0, dots, dots / (targets[:, None] * samples))
        return Norms(samples, targets, cosines)

    def lr_scores(self) -> Tensor:
        """lr · dot, each parameter with the lr of its own group, (K, N); NaN without an optimizer.
        0 for those of an optimizer that did not take the step."""
        if not self.leaf_lrs:
            return torch.full_like(self.scores(), float("nan"))
        parts: dict[int, list[Tensor]] = {}
        for leaf, lr in self.leaf_lrs.items():
            parts.setdefault(self.optimizer_of[leaf], []).append(lr * self.dots(leaf))
        sums = [torch.stack(own).sum(0).where(self._took(k), 0.0) for k, own in parts.items()]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)

    def took_step(self) -> Tensor:
        """Whether each optimizer took the step; a single one where there is none."""
        return torch.stack([self._took(k) for k in range(max(1, len(self.applied)))])

    def _took(self, optimizer: int) -> Tensor:
        applied = self.applied[optimizer] if self.applied else True
        if isinstance(applied, Tensor):
            return applied.to(self.step.scale.device)
        # Filled where it is: a copy from the host waits.
        return torch.full((), applied, device=self.step.scale.device)


def _tensor(x: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor where it is, anything else as one on the host, whatever device is torch's default."""
    device = x.device if isinstance(x, Tensor) else "cpu"
    return torch.as_tensor(x, dtype=dtype, device=device)


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What `torch.nn.utils.clip_grad_norm_` multiplied gradients of this norm by, 0-dim fp64."""
    return (max_norm / (norm.double() + 1e-6)).clamp(max=1.0)


def sample_weights(micros: Sequence[MicroBatch]) -> list[Tensor]:
    """The weight of each sample's mean loss in the loss of the whole optimizer step, (N,) each.

    That loss is taken to be the mean over the micro-batches, weighted as the caller scaled them
    (a factor common to all, as a GradScaler's, does not matter, but for its sign: a loss that is to rise,
    as in unlearning, has a negative weight). With `num_items_in_batch` it is
    the sum over all labelled tokens divided by that number. Where its `unit` is known, it is what was
    trained on: the sum of the micro-batches' losses as they were scaled, averaged over processes.
    """
    factors = [micro.loss_scale.factor() for micro in micros]
    sizes = [factor.abs() for factor in factors]
    units = [micro.unit for micro in micros if micro.unit is not None]
    if len(units) == len(micros):
        known = zip(micros, factors, units, strict=True)
        return [micro.token_weights() * (f / unit) for micro, f, unit in known]
    if len({(micro.loss_reduction, micro.items is None) for micro in micros}) > 1:
        raise GraddotError(
            "the losses of some of the step's micro-batches were divided by num_items_in_batch, of"
            " others not, so that the samples' weights in the step are not known; pass it to all or none"
        )
    tokens = [micro.counts[: micro.n].double() for micro in micros]
    totals = [micro.n_train for micro in micros if micro.n_train is not None]
    if micros[0].loss_reduction == "mean":
        tokens = [own / total.to(own.device) for own, total in zip(tokens, totals, strict=True)]
        whole = torch.stack(sizes).sum()
    elif micros[0].items is not None:
        whole = torch.stack(sizes).mean() * micros[0].items
    else:
        parts = zip(sizes, totals, strict=True)
        whole = torch.stack([f * total.to(f.device) for f, total in parts]).sum()
    return [own * (f / whole) for own, f in zip(tokens, factors, strict=True)]


def score_rows(
    micros: Sequence[MicroBatch],
    targets: Sequence[str] | None,
    columns: Mapping[str, Any],
    gradient_scale: Number,
) -> Iterator[tuple[dict[str, Any], int]]:
    """The store's rows of every micro-batch and its iteration; targets is None for a single one.

    Columns are tensors where they were computed, which nothing here waits for.
    Values are of gradients that were multiplied by gradient_scale before the optimizer's step.
    """
    at, samples = 0, sum(micro.n for micro in micros)
    for name, column in columns.items():
        if len(column) != samples:
            raise GraddotError(
                f"column {name} has {len(column)} entries; expected {samples}, one for each training"
                " sample since the last aggregate_and_log()"
            )
    for micro, weights in zip(micros, sample_weights(micros), strict=True):
        n = micro.n
        rows: dict[str, Any] = {
            "sample_id": _tensor(micro.sample_ids),
            "n_tokens": micro.counts[:n],
            "lr": _tensor(micro.lr, torch.float64).expand(n),
        }
        dots, values = micro.scores(), micro.lr_scores() * weights * gradient_scale
        took = micro.took_step()
        rows["applied"] = took.all().expand(n)
        # In a step that was not taken gradients, and so dots and weights, may be infinite.
        values = values.where(took.any(), 0.0)
        norms = micro.norms() if micro.step.norms else None
        if norms is not None:
            rows["norm"] = norms.samples
        for k in range(len(dots)):
            suffix = "" if targets is None else f"_{targets[k]}"
            rows[f"dot{suffix}"], rows[f"value{suffix}"] = dots[k], values[k]
            if norms is not None:
                rows[f"cosine{suffix}"] = norms.cosines[k]
        if taken := columns.keys() & {"step", *rows}:
            raise GraddotError(
                f"columns {sorted(taken)} are the engine's own; name yours otherwise"
            )
        rows |= {name: column[at : at + n] for name, column in columns.items()}
        yield rows, micro.iteration
        at += n
