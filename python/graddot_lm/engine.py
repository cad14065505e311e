"""GradDotProdEngine: scores for every training sample from an ordinary training step.

    engine = GradDotProdEngine(model, val_data=(X_val, Y_val))
    engine.attach(optimizer)
    engine.attach_train_batch(X, Y, iteration, sample_ids)
    X, Y = engine.prepare_forward_input(X, Y)      # validation rows behind training rows
    model(X, labels=Y).loss.backward()             # .grad is now the training gradient
    engine.prepare_gradients()
    optimizer.step()
    scores = engine.aggregate_and_log()            # (N,)
    engine.detach()

The score of sample i is ⟨∇L_val, ∇L_i⟩, each L the mean loss over its own labelled tokens, so it
does not depend on what else is in the batch. The README says how to read it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .errors import GraddotError
from .layers import Step
from .rows import Layout, find_layouts
from .rules import refusal, rule_for
from .scored import ScoredForward
from .verify import LabelCheck, check_parameter_uses

Batch = tuple[Tensor, Tensor]


class ScoreWriter(Protocol):
    """Where scores go: `graddot_lm.store.PartWriter`, or anything with this method."""

    def append(self, rows: Mapping[str, Any], step: int) -> None: ...


@dataclass
class _MicroBatch:
    """What one `attach_train_batch` leaves until its scores are read."""

    step: Step
    iteration: int
    sample_ids: Any
    labels: Tensor  # (rows, ...) of the joint batch
    leaves: dict[str, Tensor]  # (K, N) each; their gradients are the raw dots
    loss_scale: Tensor  # 0-dim leaf; its gradient is the factor that the loss was multiplied by
    counts: Tensor | None = None  # (rows,) labelled tokens
    forwarded: bool = False
    lr: float | None = None


@dataclass(frozen=True)
class Coverage:
    """Which trainable parameters the scores cover, and their share of all trainable elements."""

    covered: list[str]
    excluded: list[str]
    share: float

    def __str__(self) -> str:
        text = f"{len(self.covered)} parameters scored, {self.share:.1%} of the trainable elements"
        return text + (f"; excluded: {', '.join(self.excluded)}" if self.excluded else "")


def _cover(model: nn.Module, exclude: Sequence[str]) -> tuple[dict[str, nn.Parameter], Coverage]:
    """The trainable parameters by name, all in layers with a rule; GraddotError otherwise."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise GraddotError("the model has no trainable parameter")
    unknown = set(exclude) - set(trainable)
    if unknown:
        raise GraddotError(f"exclude names no trainable parameter: {', '.join(sorted(unknown))}")
    names = {id(p): name for name, p in trainable.items()}
    total = sum(p.numel() for p in trainable.values())
    problems: dict[str, str] = {}
    for module in model.modules():
        reason = refusal(module)
        for p in module.parameters(recurse=False):
            if reason is not None and id(p) in names:
                problems[names[id(p)]] = reason
    if problems:
        share = sum(trainable[name].numel() for name in problems) / total
        listed = "\n".join(f"  {name}: {reason}" for name, reason in problems.items())
        raise GraddotError(
            f"{len(problems)} trainable parameters ({share:.1%} of the elements) cannot be scored;"
            f" freeze them or use a layer with a rule:\n{listed}"
        )
    covered = [name for name in trainable if name not in exclude]
    share = sum(trainable[name].numel() for name in covered) / total
    return trainable, Coverage(covered, sorted(exclude), share)


class GradDotProdEngine:
    """Gradient dot products of every training sample with one or several validation batches.

    Args:
        model: linear layers, embeddings, layer and RMS norms and convolutions have their rules;
            `register_layer` adds others, and the rest gets a general rule, proven on the first
            batch, or is refused by name with the reason. Parameters may be tied.
        val_data: (X_val, Y_val), validation rows in the first dimension, V ≥ 1, or a dict
            {target name: (X_val, Y_val)} for K targets at once; scores are then (K, N).
        loss_reduction: how the caller's loss reduces over labelled tokens, "mean" or "sum".
        label_shift: by how many tokens the *loss* shifts the labels: 0 when labels[t] is the
            target of position t, 1 when it is that of position t-1. "auto" is 1 when `labels=` is
            passed to a Hugging Face causal language model, which shifts them itself, else 0. The
            first backward counts the tokens that the loss used and raises if they differ.
        ignore_index: labels of this value are not counted.
        exclude: names of parameters to train but not to score, reported by `coverage()`.
        per_parameter: keep the dots of each parameter for `parameter_dots()`.
        store: where `aggregate_and_log` writes; see `ScoreWriter`.

    Raises GraddotError for parameters that cannot be covered (all of them named, with their share)
    and for validation data without rows or labels.
    """

    def __init__(
        self,
        model: nn.Module,
        val_data: Batch | Mapping[str, Batch],
        *,
        loss_reduction: Literal["mean", "sum"] = "mean",
        label_shift: Literal["auto", 0, 1] = "auto",
        ignore_index: int = -100,
        exclude: Sequence[str] = (),
        per_parameter: bool = False,
        store: ScoreWriter | None = None,
    ) -> None:
        if loss_reduction not in ("mean", "sum"):
            raise GraddotError(f"loss_reduction is {loss_reduction!r}; expected 'mean' or 'sum'")
        if label_shift not in ("auto", 0, 1):
            raise GraddotError(f"label_shift is {label_shift!r}; expected 'auto', 0 or 1")
        self.model, self.store = model, store
        self.loss_reduction, self.label_shift = loss_reduction, label_shift
        self.ignore_index = ignore_index
        self._per_parameter = per_parameter
        self._single_target = not isinstance(val_data, Mapping)
        self._val = dict(val_data) if isinstance(val_data, Mapping) else {"val": val_data}
        self._check_val_data()
        self._parameters, self._coverage = _cover(model, exclude)
        rules = {name: rule_for(module) for name, module in model.named_modules()}
        self._rules = {name: rule for name, rule in rules.items() if rule is not None}
        self._optimizer: torch.optim.Optimizer | None = None
        self._attached: list[tuple[nn.Module, Any]] = []
        self._hooks: list[Any] = []
        self._active: _MicroBatch | None = None
        self._pending: list[_MicroBatch] = []
        self._label_check: LabelCheck | None = None
        self._layouts: dict[Any, dict[str, Layout]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "GradDotProdEngine":
        """Itself: a copy of an attached model keeps the hooks, which ignore all but this model."""
        return self

    def _check_val_data(self) -> None:
        if not self._val:
            raise GraddotError("val_data has no target; expected at least one")
        for target, (x, y) in self._val.items():
            if x.shape[0] == 0 or x.shape[0] != y.shape[0]:
                raise GraddotError(
                    f"validation data {target!r} has {x.shape[0]} inputs and {y.shape[0]} labels;"
                    " expected the same number of rows, at least one"
                )
            if self._count(y, 1 if self.label_shift == 1 else 0).sum() == 0:
                raise GraddotError(f"validation data {target!r} has no labelled token")

    def coverage(self) -> Coverage:
        """Which trainable parameters the scores cover, and their share of the elements."""
        return self._coverage

    # Life cycle

    def attach(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put the scored layers in place. The optimizer is only read, for the learning rate."""
        if self._attached:
            raise GraddotError("the engine is attached already; detach() it first")
        forwards = (module.__dict__.get("forward") for module in self.model.modules())
        if any(isinstance(forward, ScoredForward) for forward in forwards):
            raise GraddotError("another engine is attached to the model; detach() it first")
        self._optimizer = optimizer
        for name, module in self.model.named_modules():
            rule = self._rules.get(name)
            if rule is not None:
                self._attached.append((module, module.__dict__.get("forward")))
                scored = ScoredForward(module, name, rule, self._current_step)
                module.forward = scored  # type: ignore[method-assign]
        self._hooks = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward),
        ]

    def detach(self) -> None:
        """Leave the model exactly as it was before `attach`."""
        for module, forward in self._attached:
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward
        for hook in self._hooks:
            hook.remove()
        self._attached, self._hooks = [], []
        self._active, self._pending = None, []

    def detach_for_evaluation(self) -> None:
        """Run the model as it was until `reattach_after_evaluation`. Not in the midst of a step."""
        if self._active is not None or self._pending:
            raise GraddotError("a step is under way; call aggregate_and_log() first")
        self.detach()

    def reattach_after_evaluation(self) -> None:
        """Attach again, with the same optimizer."""
        self.attach(self._optimizer)

    # One step

    def attach_train_batch(self, X: Tensor, Y: Tensor, iteration: int, batch_idx: Any) -> None:
        """Announce N training rows; batch_idx holds their sample ids, (N,), for the store.

        Between two calls of `aggregate_and_log` there may be several, the micro-batches of one
        optimizer step: their scores come side by side.
        """
        if not self._attached:
            raise GraddotError("call attach(optimizer) before attach_train_batch")
        if self._active is not None:
            raise GraddotError("the previous batch had no prepare_gradients(); call it first")
        if X.shape[0] == 0 or X.shape[0] != Y.shape[0]:
            raise GraddotError(
                f"the training batch has {X.shape[0]} inputs and {Y.shape[0]} labels; expected the"
                " same number of rows, at least one"
            )
        n, val_rows = X.shape[0], [x.shape[0] for x, _ in self._val.values()]
        first = next(iter(self._parameters.values()))
        kwargs: dict[str, Any] = {"device": first.device, "requires_grad": True}
        covered = self._coverage.covered
        leaves = {
            key: torch.zeros(len(val_rows), n, dtype=torch.float64, **kwargs)
            for key in (covered if self._per_parameter else ["total"])
        }
        sinks = {
            id(self._parameters[name]): leaves[name if self._per_parameter else "total"]
            for name in covered
        }
        scale = torch.ones((), dtype=first.dtype if first.dtype == torch.float64 else None)
        rows, is_first = n + sum(val_rows), self._label_check is None
        step = Step(rows, val_rows, scale.to(first.device), sinks, first=is_first)
        labels = torch.cat([Y, *(y.to(Y.device) for _, y in self._val.values())])
        loss_scale = torch.zeros((), **kwargs)
        self._active = _MicroBatch(step, iteration, batch_idx, labels, leaves, loss_scale)
        self._set_counts(self._active, 1 if self.label_shift == 1 else 0)

    def prepare_forward_input(self, X: Tensor, Y: Tensor) -> Batch:
        """The joint batch: training rows, then the validation rows of every target."""
        if self._active is None:
            raise GraddotError("call attach_train_batch before prepare_forward_input")
        parts = [(X, Y), *self._val.values()]
        shapes = [tuple(x.shape[1:]) for x, _ in parts]
        if len(set(shapes)) > 1:
            raise GraddotError(
                f"training rows have shape {shapes[0]}, validation rows {shapes[1:]}; rows that"
                " ride along in one forward must agree"
            )
        inputs = torch.cat([x.to(X.device) for x, _ in parts])
        return inputs, torch.cat([y.to(Y.device) for _, y in parts])

    def track_loss(self, loss: Tensor) -> Tensor:
        """The same loss, whose later scaling (GradScaler, 1/accumulation) the scores will undo.

        Needed only for a loss that the caller computes; `.loss` of a model's output is tracked.
        """
        return loss if self._active is None else loss + self._active.loss_scale.to(loss.dtype)

    def prepare_gradients(self) -> None:
        """Close a micro-batch after its backward. `.grad` is right already; this checks that.

        Raises GraddotError if no backward ran or if the loss counted other tokens than the labels
        say; .grad must not be used then.
        """
        micro = self._active
        if micro is None or not micro.forwarded:
            raise GraddotError("no forward pass of the model ran since attach_train_batch")
        if all(leaf.grad is None for leaf in micro.leaves.values()):
            raise GraddotError("no backward pass ran since the forward, or none reached the layers")
        held = [uses.name for uses in micro.step.shared.values() if uses.held is not None]
        if held:
            raise GraddotError(
                f"{', '.join(held)}: the loss depends on the shared weight's linear layer, but not"
                " on its embedding; their gradient cannot be completed"
            )
        if self._label_check is not None and self._label_check.problem is not None:
            raise GraddotError(self._label_check.problem)
        if self._optimizer is not None:
            micro.lr = float(self._optimizer.param_groups[0]["lr"])
        self._active = None
        self._pending.append(micro)

    def parameter_dots(self) -> dict[str, Tensor]:
        """Dots by parameter since the last `aggregate_and_log`, (N,) or (K, N) each.

        Needs `per_parameter=True`. They add up to the scores.
        """
        if not self._per_parameter:
            raise GraddotError("parameter_dots needs GradDotProdEngine(..., per_parameter=True)")
        self._require_pending()
        return {
            name: self._shaped([self._public(m, m.leaves[name].grad) for m in self._pending])
            for name in self._coverage.covered
        }

    def aggregate_and_log(self, columns: Mapping[str, Any] | None = None) -> Tensor:
        """Scores ⟨∇L_val, ∇L_i⟩ of the rows since the last call, (N,) or (K, N), fp64.

        With a store, one row a sample is appended: step, sample_id, n_tokens, dot, lr and value,
        and the further `columns` given here, (N,) each.
        """
        if self._active is not None:
            self.prepare_gradients()
        self._require_pending()
        dots = []
        for micro in self._pending:
            grads = [leaf.grad for leaf in micro.leaves.values() if leaf.grad is not None]
            dots.append(self._public(micro, torch.stack(grads).sum(0)))
        scores = self._shaped(dots)
        if self.store is not None:
            self._log(self.store, torch.cat(dots, 1), columns or {})
        self._pending = []
        return scores

    def clear_gradients(self) -> None:
        """Drop all gradients, and the scores of a step that is not to count."""
        self.model.zero_grad(set_to_none=True)
        self._active, self._pending = None, []

    # Inside

    def _current_step(self) -> Step | None:
        return None if self._active is None else self._active.step

    def _require_pending(self) -> None:
        if not self._pending:
            raise GraddotError("no scores: run a step from attach_train_batch to its backward")

    def _shaped(self, dots: list[Tensor]) -> Tensor:
        joined = torch.cat(dots, 1)
        return joined[0] if self._single_target else joined

    def _count(self, labels: Tensor, shift: int) -> Tensor:
        """Labelled tokens of each row, (rows,). Labels of a regression all count."""
        if labels.is_floating_point():
            return torch.full((labels.shape[0],), labels[0].numel(), device=labels.device)
        if shift:
            labels = labels[:, shift:]
        return (labels != self.ignore_index).reshape(labels.shape[0], -1).sum(1)

    def _set_counts(self, micro: _MicroBatch, shift: int) -> None:
        micro.counts = self._count(micro.labels, shift)
        if self.loss_reduction == "mean":
            n_train = micro.counts[: -sum(micro.step.val_rows)].sum()
            micro.step.scale.copy_(micro.counts.sum().double() / n_train.clamp(min=1))

    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        micro = self._active
        if micro is None or module is not self.model:
            return
        if micro.forwarded:
            raise GraddotError("the model ran twice since attach_train_batch; one forward a batch")
        if kwargs.get("num_items_in_batch") is not None:
            raise GraddotError("num_items_in_batch changes the loss's mean; leave it out")
        self._find_layouts(micro, args, kwargs)
        if self.label_shift == "auto" and kwargs.get("labels") is not None:
            loss = getattr(module, "loss_function", None)
            self._set_counts(micro, int(getattr(loss, "__name__", "") == "ForCausalLMLoss"))

    def _find_layouts(self, micro: _MicroBatch, args: Any, kwargs: Any) -> None:
        """Learn how each layer's input holds the rows, from runs of the model as it was.

        Once in each mode; for every new shape where layers see tokens without their rows.
        """
        mode = (self.model.training,)
        shapes = [x.shape[1:] for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        layouts = self._layouts.get(mode, self._layouts.get((*mode, *shapes)))
        if layouts is None:
            names = {id(module): name for name, module in self.model.named_modules()}
            layers = {names[id(module)]: module for module, _ in self._attached}
            self._active = None
            try:
                layouts = find_layouts(self.model, layers, args, kwargs, micro.step.rows)
            finally:
                self._active = micro
            flat = any(isinstance(layout, int) for layout in layouts.values())
            if layouts:
                self._layouts[(*mode, *shapes) if flat else mode] = layouts
        micro.step.layouts.update(layouts)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        micro = self._active
        if micro is None or module is not self.model or not torch.is_grad_enabled():
            return output
        micro.forwarded = True
        if self._label_check is None:
            check_parameter_uses(output, self._parameters)
            assert micro.counts is not None
            self._label_check = LabelCheck(output, micro.labels, micro.counts)
        if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
            output["loss"] = self.track_loss(output["loss"])  # type: ignore[index]
        return output

    def _public(self, micro: _MicroBatch, raw: Tensor | None) -> Tensor:
        """Raw dots of the joint loss, (K, N), as ⟨∇L_val, ∇L_i⟩ of the mean losses."""
        if raw is None:  # a parameter that the forward did not use
            raw = torch.zeros_like(next(iter(micro.leaves.values())))
        assert micro.counts is not None
        counts = micro.counts.to(raw.device, raw.dtype)
        n = raw.shape[1]
        targets = torch.stack([c.sum() for c in torch.split(counts[n:], micro.step.val_rows)])
        factor = 1 / (targets[:, None] * counts[:n].clamp(min=1))
        if self.loss_reduction == "mean":
            factor = factor * counts.sum() ** 2
        if micro.loss_scale.grad is not None:
            factor = factor / micro.loss_scale.grad.to(raw.dtype) ** 2
        return raw * factor

    def _log(self, store: ScoreWriter, dots: Tensor, columns: Mapping[str, Any]) -> None:
        at = 0
        for micro in self._pending:
            n = micro.leaves[next(iter(micro.leaves))].shape[1]
            assert micro.counts is not None
            counts = micro.counts[:n].cpu()
            lr = float("nan") if micro.lr is None else micro.lr
            share = counts.double() / counts.sum().clamp(min=1) / len(self._pending)
            rows: dict[str, Any] = {
                "sample_id": torch.as_tensor(micro.sample_ids),
                "n_tokens": counts,
                "lr": torch.full((n,), lr, dtype=torch.float64),
            }
            for target, dot in zip(self._val, dots[:, at : at + n].cpu(), strict=True):
                suffix = "" if self._single_target else f"_{target}"
                rows[f"dot{suffix}"] = dot
                rows[f"value{suffix}"] = lr * share * dot
            for name, column in columns.items():
                rows[name] = column[at : at + n]
            arrays = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in rows.items()}
            store.append(arrays, micro.iteration)
            at += n
