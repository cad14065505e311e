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

Instead of riding along, validation rows may be run by themselves, every so many steps:

    engine = GradDotProdEngine(model)
    engine.set_directions(engine.compute_directions(val_batches))
"""

import functools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import compiled, distributed
from .batches import (
    Batch,
    Inputs,
    Rows,
    count_labels,
    has_causal_lm_loss,
    is_batch,
    join,
    label_shift_of,
    read_batch,
    read_rows,
)
from .checkpointing import ReentrantCheck, has_reentrant_checkpoint, recomputing
from .compiler import prepare_compiler, run_compiled, run_uncompiled, skipped, uncompiled
from .coverage import Coverage, cover
from .directions import (
    Direction,
    LossFunction,
    batch_loss,
    direction_norms,
    mean_gradient,
    stack_directions,
)
from .errors import GraddotError
from .layers import ScoredFunction, Step
from .rows import Layout, check_loss, find_layouts
from .rules import rule_for
from .scored import ScoredForward
from .scores import MicroBatch, Norms, Number, leaf_names, learning_rates, score_rows
from .tracing import rows_of, trace_after, trace_before
from .verify import LabelCheck, check_parameter_uses, tensors_in


class ScoreWriter(Protocol):
    """Where scores go: `graddot_lm.background.BackgroundWriter`, or anything with this method.

    Columns that the engine computed are tensors, (N,) each, on the model's device, whose kernels
    may not have run yet: a store that reads them at once makes the loop wait for the device.
    """

    def append(self, rows: Mapping[str, Any], step: int) -> None: ...


class GradDotProdEngine:
    """Gradient dot products of every training sample with one or several validation gradients.

    A batch is (inputs, labels), where inputs are a tensor or a mapping of tensors, or a mapping
    with "labels" inside, as Hugging Face's collators make them; rows come first in every tensor.

    Args:
        model: linear layers, embeddings, layer and RMS norms and convolutions have their rules;
            `register_layer` adds others, and the rest gets a general rule, proven on the first
            batch, or is refused by name with the reason. Parameters may be tied. The model may be
            wrapped in DistributedDataParallel, before or after, or sharded by `fully_shard`
            before: each process then has training rows of its own and the same validation rows.
        val_data: a batch of V ≥ 1 validation rows that ride along with the training rows, or a
            dict {target name: batch} for K targets at once; scores are then (K, N). None if
            directions are given, by `compute_directions` or `set_directions`.
        loss_reduction: how the caller's loss reduces over labelled tokens, "mean" or "sum".
        label_shift: by how many tokens the *loss* shifts the labels: 0 when labels[t] is the
            target of position t, 1 when it is that of position t-1. "auto" is 1 when `labels=` is
            passed to a Hugging Face causal language model, which shifts them itself, else 0. The
            first backward counts the tokens that the loss used and raises if they differ.
        ignore_index: labels of this value are not counted.
        padding: {key: value} to fill shorter rows up with on the right, where validation and
            training rows differ in length ("inputs" is the key of inputs that are a tensor);
            labels are filled up with ignore_index. Without it such rows are refused. A model that
            looks to the right needs its attention mask among the keys.
        exclude: names of parameters to train but not to score, reported by `coverage()`.
        per_parameter: keep the dots of each parameter for `parameter_dots()`.
        per_token: keep the dots of each token for `token_dots()`; for given directions only.
        norms: also compute every sample's gradient norm, for `gradient_norms()`, `target_norms()`
            and `cosines()`, and the columns norm and cosine of the store (cosine_<target> of each
            of several). Over the covered parameters, exactly, cross terms of tied ones included.
            Not with per_token, for a token's part of a norm is not its own.
        store: where `aggregate_and_log` writes; see `ScoreWriter`.
        global_mean: with several processes and a mean loss, weight all labelled training tokens
            alike, as one process with all the rows would. Without it each process's mean loss
            weighs the same, as is usual under DDP and FSDP; the two differ only where processes
            have different numbers of labelled tokens. Values are those of the weights used.
        process_group: over which gradients are averaged; needed only where it is done by other
            means than DDP or `fully_shard`.

    Raises GraddotError for parameters that cannot be covered (all of them named, with their share)
    and for validation data without rows or labels.
    """

    def __init__(
        self,
        model: nn.Module,
        val_data: Batch | Mapping[str, Batch] | None = None,
        *,
        loss_reduction: Literal["mean", "sum"] = "mean",
        label_shift: Literal["auto", 0, 1] = "auto",
        ignore_index: int = -100,
        padding: Mapping[str, float] | None = None,
        exclude: Sequence[str] = (),
        per_parameter: bool = False,
        per_token: bool = False,
        norms: bool = False,
        store: ScoreWriter | None = None,
        global_mean: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if loss_reduction not in ("mean", "sum"):
            raise GraddotError(f"loss_reduction is {loss_reduction!r}; expected 'mean' or 'sum'")
        if label_shift not in ("auto", 0, 1):
            raise GraddotError(f"label_shift is {label_shift!r}; expected 'auto', 0 or 1")
        if per_token and val_data is not None:
            raise GraddotError(
                "per_token needs given directions; leave val_data out and call set_directions"
            )
        if per_token and norms:
            raise GraddotError(
                "norms=True is of whole samples, and per_token=True scores tokens; make an engine"
                " for one of them"
            )
        if global_mean and loss_reduction != "mean":
            raise GraddotError("global_mean weights the terms of a mean; the loss is a sum")
        model = distributed.unwrapped(model)
        self.model, self.store = model, store
        self.global_mean, self.process_group = global_mean, process_group
        self.loss_reduction, self.label_shift = loss_reduction, label_shift
        self.ignore_index, self._padding = ignore_index, dict(padding or {})
        self._per_parameter, self._per_token, self.norms = per_parameter, per_token, norms
        self._targets: list[str] | None = None  # None for a single one without a name
        self._val: list[Rows] = []
        if val_data is not None:
            self._val = self._read_val_data(val_data)
        self._parameters, self._coverage = cover(model, exclude)
        names = {id(p): name for name, p in self._parameters.items()}
        self._owned = {  # by module; a tied parameter has one name in all of them
            module_name: {
                key: names[id(p)]
                for key, p in module.named_parameters(remove_duplicate=False)
                if id(p) in names
            }
            for module_name, module in model.named_modules()
        }
        self._whole: dict[str, nn.Parameter] = {}
        self._directions: dict[int, Tensor] | None = None
        self._direction_norms: Tensor | None = None
        rules = {name: rule_for(module) for name, module in model.named_modules()}
        self._rules = {name: rule for name, rule in rules.items() if rule is not None}
        self._optimizer: torch.optim.Optimizer | None = None
        self._attached: list[tuple[nn.Module, Any]] = []
        self._hooks: list[Any] = []
        self._active: MicroBatch | None = None
        self._suspended: MicroBatch | None = None
        self._pending: list[MicroBatch] = []
        self._logged_norms: list[Norms] = []
        self._logged_unapplied = False
        self._label_check: LabelCheck | None = None
        self._reentrant: ReentrantCheck | None = None
        self._check_reentrant = True
        self._layouts: dict[Any, dict[str, Layout]] = {}
        self._forwards: dict[str, ScoredForward] = {}
        self.number = next(compiled.numbers)
        self.clock = torch.zeros((), dtype=torch.int64)  # what orders a compiled step
        self.sites: list[Any] = []
        weakref.finalize(self, run_compiled, self.number)  # a first step that was given up
        self._seen: set[Any] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> "GradDotProdEngine":
        """Itself: a copy of an attached model keeps the hooks, which ignore all but this model."""
        return self

    def _read_val_data(self, val_data: Batch | Mapping[str, Batch]) -> list[Rows]:
        by_target: Mapping[str, Any] = {"val": val_data}
        if not is_batch(val_data):
            by_target, self._targets = dict(val_data), list(val_data)  # type: ignore[arg-type]
        if not by_target:
            raise GraddotError("val_data has no target; expected at least one")
        rows = []
        for target, batch in by_target.items():
            rows.append(read_batch(batch, f"validation data {target!r}"))
            if self._count(rows[-1].labels, 1 if self.label_shift == 1 else 0).sum() == 0:
                raise GraddotError(f"validation data {target!r} has no labelled token")
        return rows

    def coverage(self) -> Coverage:
        """Which trainable parameters the scores cover, and their share of the elements."""
        return self._coverage

    # Given directions

    def set_directions(self, directions: Direction | Mapping[str, Direction]) -> None:
        """Dot every training sample with these from now on: {parameter name: tensor of its shape},
        or {target name: such a mapping} for K at once.

        Training rows then run alone. The tensors are held as they are, or copied to the
        parameter's device and fp32 (fp64 for fp64). Raises GraddotError if they do not fit the
        covered parameters, if validation rows ride along, and in the midst of a step.
        """
        if self._val:
            raise GraddotError("validation rows ride along; leave val_data out to give directions")
        if self._active is not None or self._pending:
            raise GraddotError("a step is under way; call aggregate_and_log() first")
        single = [isinstance(value, Tensor) for value in directions.values()]
        if not single or len(set(single)) > 1:
            raise GraddotError(
                "directions are neither all tensors, by parameter name, nor all mappings of such,"
                " by target name"
            )
        named = not single[0]
        by_target: Mapping[str, Any] = directions if named else {"val": directions}
        stacked = stack_directions(by_target, self._parameters, self._coverage.covered)
        self._directions, self._targets = stacked, list(directions) if named else None
        if self.norms:
            self._direction_norms = direction_norms(stacked)

    def compute_directions(
        self,
        batches: Iterable[Batch] | Mapping[str, Iterable[Batch]],
        loss_fn: LossFunction | None = None,
        *,
        loss_scale: float = 1.0,
    ) -> dict[str, Any]:
        """The validation gradient of any number of batches, for `set_directions`.

        Gradient of the mean loss over all their labelled tokens by parameter name, or a mapping of
        that for a mapping {target name: batches}. loss_fn(model, inputs, labels) gives a batch's
        loss, reduced as `loss_reduction` says; by default model(**inputs, labels=labels).loss. It
        runs the model as it is: call `model.eval()` first for a gradient without dropout, and
        inside autocast if training is. loss_scale keeps an fp16 backward from rounding to zero, as
        a GradScaler's scale does; where it overflows, a smaller one is taken, and the result is not
        scaled. `.grad` and scores are left alone. Raises GraddotError without labelled tokens and
        if the gradient is not finite.
        """
        if isinstance(batches, Mapping):
            return {
                name: self.compute_directions(own, loss_fn, loss_scale=loss_scale)
                for name, own in batches.items()
            }
        loss_of = lambda batch: self._validation_loss(batch, loss_fn)
        kept = self._active, self._logged_unapplied
        self._active = None
        try:
            covered = self._coverage.covered
            return mean_gradient(self._parameters, covered, batches, loss_of, loss_scale)
        finally:
            self._active, self._logged_unapplied = kept

    def _validation_loss(
        self, batch: Batch, loss_fn: LossFunction | None
    ) -> tuple[Tensor, float, float]:
        rows = read_batch(batch, "a validation batch")
        loss = batch_loss(self.model, rows, loss_fn)
        shift = self._shift_of_labels_argument() if loss_fn is None else self.label_shift == 1
        count = float(self._count(rows.labels, int(shift)).sum())
        return loss, count if self.loss_reduction == "mean" else 1.0, count

    # Life cycle

    def attach(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put the scored layers in place. The optimizer is only read: its learning rates, and
        whether it took the step."""
        if self._attached:
            raise GraddotError("the engine is attached already; detach() it first")
        forwards = (module.__dict__.get("forward") for module in self.model.modules())
        if any(isinstance(forward, ScoredForward) for forward in forwards):
            raise GraddotError("another engine is attached to the model; detach() it first")
        while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = optimizer.optimizer  # type: ignore[union-attr]  # accelerate's wrapper
        self._optimizer = optimizer
        groups = [] if optimizer is None else optimizer.param_groups
        updated = {id(p) for group in groups for p in group["params"]}
        if optimizer is not None and not updated & {id(p) for p in self._parameters.values()}:
            raise GraddotError("the optimizer updates none of the model's trainable parameters")
        for name, module in self.model.named_modules():
            if name not in self._owned:
                raise GraddotError(f"module {name} is new since the engine was made; make it last")
            rule = self._rules.get(name)
            if rule is not None:
                self._attached.append((module, module.__dict__.get("forward")))
                module.forward = self._scored_forward(module, name, rule)  # type: ignore[method-assign]
        self._hooks = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward, always_call=True),
        ]
        if isinstance(optimizer, torch.optim.Optimizer):
            self._hooks.append(optimizer.register_step_post_hook(self._after_optimizer_step))

    def _scored_forward(self, module: nn.Module, name: str, rule: Any) -> ScoredForward:
        """The same after each `attach`, so that what was compiled stays valid."""
        scored = self._forwards.get(name)
        if scored is None:
            begin, end = self._begin_layer, self._end_layer
            scored = self._forwards[name] = ScoredForward(module, name, rule, begin, end, self)
            scored.graddot_head = functools.partial(self._begin_head, module, name)  # type: ignore[attr-defined]
        scored.own_forward = module.forward
        return scored

    def detach(self) -> None:
        """Leave the model exactly as it was before `attach`."""
        for module, forward in self._attached:
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward
        for hook in self._hooks:
            hook.remove()
        if self._reentrant is not None:
            self._reentrant.remove()
        self._attached, self._hooks, self._reentrant = [], [], None
        run_compiled()
        rows_of.pop(self.number, None)
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

    def attach_train_batch(
        self, X: Inputs, Y: Tensor | None, iteration: int, batch_idx: Any
    ) -> None:
        """Announce N training rows; batch_idx holds their sample ids, (N,), for the store.

        X is a tensor or a mapping of tensors, Y the labels, or None if they are X["labels"].
        Between two calls of `aggregate_and_log` there may be several, the micro-batches of one
        optimizer step: their scores come side by side.
        """
        prepare_compiler()
        run_compiled()
        if not self._attached:
            raise GraddotError("call attach(optimizer) before attach_train_batch")
        if self._active is not None:
            raise GraddotError("the previous batch had no prepare_gradients(); call it first")
        if not self._val and self._directions is None:
            raise GraddotError(
                "there is no direction; call set_directions first, or give the engine val_data"
            )
        train = read_rows(X, Y, "the training batch")
        self._val = [rows.beside(train) for rows in self._val]
        parts = [train, *self._val]
        labels = join([Rows({}, p.labels) for p in parts], self._padding, self.ignore_index).labels
        val_rows = [len(part) for part in self._val]
        targets = 1 if self._targets is None else len(self._targets)
        leaf_of = leaf_names(
            self._parameters, self._coverage.covered, self._optimizer, self._per_parameter
        )
        first = next(iter(self._parameters.values()))
        kwargs: dict[str, Any] = {
            "dtype": torch.float64,
            "device": first.device,
            "requires_grad": True,
        }
        tokens = self._tokens(labels) if self._per_token else None
        n = len(parts[0])
        sink = (targets + 1, n + bool(val_rows)) if self.norms else (targets, n * (tokens or 1))
        leaves = {
            leaf: torch.zeros(sink, **kwargs)
            for leaf in dict.fromkeys(leaf_of.values())  # in an order that runs repeat
        }
        dtype = torch.promote_types(first.dtype, torch.float32)
        step = Step(
            rows=len(labels),
            val_rows=val_rows,
            scale=torch.ones((), dtype=dtype, device=first.device),
            sinks={},
            tokens=tokens,
            sharded=distributed.is_sharded(self._parameters.values()),
            first=self._label_check is None,
            norms=self.norms,
        )
        self._active = MicroBatch(
            step=step,
            iteration=iteration,
            sample_ids=batch_idx,
            labels=labels,
            leaf_of=leaf_of,
            leaves=leaves,
            loss_scales=[torch.zeros((), **kwargs)],
            loss_reduction=self.loss_reduction,
            counts=labels.new_zeros(len(labels)),
            direction_norms=self._direction_norms,
        )
        self._active.set_counts(self._count(labels, 1 if self.label_shift == 1 else 0))
        self._logged_unapplied = False
        rows_of[self.number] = torch.empty(len(labels), dtype=torch.bool)
        mode = self._mode(len(labels))
        shape = (*mode, labels.shape[1:])
        known = mode in self._layouts or shape in self._seen
        if self._label_check is None or not known:
            run_uncompiled(self.number)  # the checks of a first step look at the model uncompiled
        self._seen.add(shape)

    def prepare_forward_input(self, X: Inputs, Y: Tensor | None = None) -> tuple[Any, Tensor]:
        """The joint batch: training rows, then the validation rows of every target.

        In the form of X; if the labels are in there, they are in what is returned first, too.
        """
        if self._active is None:
            raise GraddotError("call attach_train_batch before prepare_forward_input")
        train = read_rows(X, Y, "the training batch")
        return join([train, *self._val], self._padding, self.ignore_index).as_given()

    @uncompiled("graddot: track_loss")
    def track_loss(self, loss: Tensor) -> Tensor:
        """The same loss, whose later scaling (GradScaler, 1/accumulation) the scores will undo.

        Needed only for a loss that the caller computes; `.loss` of a model's output is tracked.
        """
        run_compiled()
        return self._tracked(loss)

    def _tracked(self, loss: Tensor) -> Tensor:
        if self._active is None:
            return loss
        leaf = torch.zeros((), dtype=torch.float64, device=loss.device, requires_grad=True)
        self._active.loss_scales.append(leaf)
        return loss + leaf.to(loss.dtype)

    def prepare_gradients(self) -> None:
        """Close a micro-batch after its backward. `.grad` is right already; this checks that.

        Raises GraddotError if no backward ran or if the loss counted other tokens than the labels
        say; .grad must not be used then.
        """
        run_compiled()
        micro = self._active
        if micro is None or not micro.forwarded:
            raise GraddotError("no forward pass of the model ran since attach_train_batch")
        if all(leaf.grad is None for leaf in micro.leaves.values()):
            raise GraddotError("no backward pass ran since the forward, or none reached the layers")
        if len(micro.loss_factors()) > 1:
            raise GraddotError(
                "the loss was tracked twice, so that its scale cannot be told; track_loss is for a"
                " loss of your own, not for a model's .loss"
            )
        held = [uses.name for uses in micro.step.shared.values() if uses.held is not None]
        if held:
            raise GraddotError(
                f"{', '.join(held)}: the loss depends on the shared weight's linear layer, but not"
                " on its embedding; their gradient cannot be completed"
            )
        if self._label_check is not None and self._label_check.problem is not None:
            raise GraddotError(self._label_check.problem)
        if self._reentrant is not None:
            check, self._reentrant = self._reentrant, None
            self._check_reentrant = not check.finish()
        if self._optimizer is not None:
            rates = learning_rates(self._parameters, micro.leaf_of, self._optimizer)
            micro.lr, micro.leaf_lrs = rates
            micro.applied = not isinstance(self._optimizer, torch.optim.Optimizer)
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
            name: self._shaped([micro.dots(name) for micro in self._pending])
            for name in self._coverage.covered
        }

    def token_dots(self) -> Tensor:
        """Every token's part of the scores since the last `aggregate_and_log`, (N, T) or (K, N, T).

        A sample's score is the sum over its tokens, where a token's part is what flows through the
        layers' weights at its position. Rows of shorter micro-batches are filled up with 0. Needs
        `per_token=True`.
        """
        if not self._per_token:
            raise GraddotError("token_dots needs GradDotProdEngine(..., per_token=True)")
        self._require_pending()
        parts = [micro.token_scores() for micro in self._pending]
        longest = max(part.shape[2] for part in parts)
        return self._shaped([F.pad(part, (0, longest - part.shape[2])) for part in parts])

    def gradient_norms(self) -> Tensor:
        """‖∇L_i‖ of every sample over the covered parameters, (N,), fp64.

        Like the scores it depends on nothing else in the batch. Of the rows since the last
        `aggregate_and_log`, or right after it of those that it returned. Needs `norms=True`, as do
        the two below.
        """
        return torch.cat([norms.samples for norms in self._norms()])

    def target_norms(self) -> Tensor:
        """‖∇L_val‖ of every target, (K,), 0-dim for a single one without a name; that of given
        directions. Of the last micro-batch: without dropout it is the same in all."""
        last = self._norms()[-1].targets
        return last[0] if self._targets is None else last

    def cosines(self) -> Tensor:
        """The scores divided by both norms, (N,) or (K, N); 0 where the score is."""
        return self._shaped([norms.cosines for norms in self._norms()])

    def aggregate_and_log(
        self, columns: Mapping[str, Any] | None = None, *, gradient_scale: float | Tensor = 1.0
    ) -> Tensor:
        """Scores ⟨∇L_val, ∇L_i⟩ of the rows since the last call, (N,) or (K, N), fp64.

        With a store, one row a sample is appended: step, sample_id, n_tokens, dot, lr and value,
        norm and cosine with `norms=True`, and the further `columns` given here, (N,) each. Values
        are those of the optimizer's step, so this comes after it, and are 0 if a GradScaler skipped
        it; gradient_scale (a number or a 0-dim tensor) is what the gradients were multiplied by
        before it, as by clipping. Nothing here waits for a GPU; whether the store does is its own
        affair.
        """
        if self._active is not None:
            self.prepare_gradients()
        self._require_pending()
        scores = self._shaped([micro.scores() for micro in self._pending])
        if self.store is not None:
            rows = score_rows(self._pending, self._targets, columns or {}, gradient_scale)
            for values, iteration in rows:
                self.store.append(values, iteration)
            self._logged_unapplied = any(micro.applied is False for micro in self._pending)
        self._logged_norms = [micro.norms() for micro in self._pending] if self.norms else []
        self._pending = []
        return scores

    def clear_gradients(self) -> None:
        """Drop all gradients, and the scores of a step that is not to count."""
        run_compiled()
        self.model.zero_grad(set_to_none=True)
        self._active, self._pending = None, []
        if self._reentrant is not None:
            self._reentrant.remove()
            self._reentrant = None

    # Inside

    def _begin_layer(self, module: nn.Module, name: str) -> Step | None:
        """The step that a layer's forward belongs to, with the layer's parameters in it."""
        micro = self._active
        # Without a graph only the first run of a reentrant checkpoint belongs to the step.
        if micro is None or not (micro.running or torch.is_grad_enabled()):
            return None
        self._resolve(micro, module, name)
        return micro.step

    def _end_layer(self, out: Any) -> None:
        if self._reentrant is not None:
            self._reentrant.watch(tensors_in(out))

    def _begin_head(self, module: nn.Module, name: str, counts: Tensor, mean: bool) -> Step | None:
        """The same for the fused head, which runs in this layer's place and sees the labels, and
        whether its loss is their mean."""
        step = self._begin_layer(module, name)
        if step is not None:
            assert self._active is not None
            if step.tokens is not None:
                raise GraddotError("per_token needs the model's own head; unfuse_head(model) first")
            expected = self._active.loss_reduction
            if mean != (expected == "mean"):
                raise GraddotError(
                    f"the fused head's loss is a {'mean' if mean else 'sum'} over labelled tokens,"
                    f" but the engine expects a {expected}; pass loss_reduction="
                )
            self._count_by_loss(self._active, counts)
        return step

    def _norms(self) -> list[Norms]:
        if not self.norms:
            raise GraddotError("norms and cosines need GradDotProdEngine(..., norms=True)")
        if not self._logged_norms:
            self._require_pending()
        return [micro.norms() for micro in self._pending] or self._logged_norms

    def _require_pending(self) -> None:
        if not self._pending:
            raise GraddotError("no scores: run a step from attach_train_batch to its backward")

    def _shaped(self, dots: list[Tensor]) -> Tensor:
        joined = torch.cat(dots, 1)
        return joined[0] if self._targets is None else joined

    def _count(self, labels: Tensor, shift: int) -> Tensor:
        return count_labels(labels, shift, self.ignore_index)

    def _tokens(self, labels: Tensor) -> int:
        if labels.dim() != 2:
            raise GraddotError(f"per_token needs labels of shape (N, T), not {tuple(labels.shape)}")
        return labels.shape[1]

    def _shift_of_labels_argument(self) -> int:
        """By how many tokens the model shifts labels that it is passed."""
        return label_shift_of(self.model) if self.label_shift == "auto" else self.label_shift

    def _after_optimizer_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # a GradScaler's, for fused optimizers
        for micro in self._pending:
            micro.applied = True if found_inf is None else found_inf == 0
        if not self._pending and self._logged_unapplied:
            raise GraddotError(
                "the optimizer's step came after aggregate_and_log(), which wrote values of 0 for"
                " a step that was not taken; call aggregate_and_log() after the step"
            )

    def _count_by_loss(self, micro: MicroBatch, counts: Tensor) -> None:
        """The loss's own counts of labelled tokens, (rows,): no guess about its shift is needed."""
        if self.label_shift != "auto" and micro.step.first:
            wrong = (counts != micro.counts.to(counts.device)).nonzero().flatten().tolist()
            if wrong:
                row = wrong[0]
                raise GraddotError(
                    f"row {row} of the joint batch has {int(micro.counts[row])} labelled tokens"
                    f" by its labels and label_shift={self.label_shift}, but the loss used"
                    f" {int(counts[row])}"
                )
        self._use_counts(micro, counts)

    def _use_counts(self, micro: MicroBatch, counts: Tensor) -> None:
        """Labelled tokens of each row, and the weight of one in the gradient of all processes."""
        group = distributed.averaging_group(list(self._parameters.values()), self.process_group)
        n_train = None
        if self.global_mean:
            own = counts[: micro.n].sum().to(micro.step.scale.device)
            n_train = distributed.summed(own, group)
        micro.set_counts(counts, distributed.world_size(group), n_train)

    def _resolve(self, micro: MicroBatch, module: nn.Module, name: str) -> None:
        """Give a layer's parameters, as they are in this forward, what goes by their names."""
        for key, parameter in module.named_parameters(remove_duplicate=False):
            owned = self._owned[name].get(key)
            if owned is None:
                if parameter.requires_grad:
                    raise GraddotError(f"{name}.{key} was frozen when the engine was made")
                continue
            known = self._parameters[owned]
            distributed.check_plain(owned, parameter, known)
            if owned in micro.leaf_of:
                micro.step.sinks[id(parameter)] = micro.leaves[micro.leaf_of[owned]]
                if self._directions is not None:
                    micro.step.directions[id(parameter)] = self._directions[id(known)]
        if self._label_check is None:
            self._whole.update(distributed.plain_parameters(self.model))

    def scoring(self) -> bool:
        """Whether a layer that runs now belongs to a step."""
        return self._active is not None and torch.is_grad_enabled()

    @skipped  # run outside of a compiled graph, or traced as a part of it
    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module is self.model:
            before = trace_before if torch.compiler.is_compiling() else type(self)._before_running
            before(self, args, kwargs)

    @skipped
    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        if module is not self.model:
            return output
        after = trace_after if torch.compiler.is_compiling() else type(self)._after_running
        return after(self, output)

    @uncompiled("graddot: the beginning of a step")
    def _before_running(self, args: Any, kwargs: dict[str, Any]) -> None:
        micro = self._active
        if micro is None:
            self._logged_unapplied &= not torch.is_grad_enabled()  # a step without scores
            return
        if not torch.is_grad_enabled():  # an evaluation in the midst of the step
            self._active, self._suspended = None, micro
            return
        if recomputing():
            if micro.forwarded:
                return
            raise GraddotError(
                "the whole model runs inside a reentrant checkpoint, where its layers are not seen"
                " in time; checkpoint parts of it, or pass use_reentrant=False"
            )
        self._start(micro, kwargs.get("num_items_in_batch"), kwargs.get("labels") is not None)
        self._find_layouts(micro, args, kwargs)
        micro.running = True

    def _begin_compiled(self, inputs: list[Tensor], items: Any, labelled: bool) -> None:
        """The same from inside a compiled graph."""
        micro = self._active
        if micro is None:
            raise GraddotError("a compiled model ran outside of the step that it was compiled for")
        shapes = [x.shape[1:] for x in inputs]
        layouts = self._known_layouts(micro, shapes)
        if layouts is None:
            raise GraddotError(
                f"no uncompiled step ran with inputs of these shapes, {shapes}, which the check that"
                " samples are kept apart needs; pass attach_train_batch labels of the same shape as"
                " those that the model gets"
            )
        micro.step.layouts.update(layouts)
        if micro.running:  # the forward raised, and is tried again
            micro.step.shared.clear()
        self._start(micro, items, labelled)
        micro.running = True

    def _start(self, micro: MicroBatch, items: Any, labelled: bool) -> None:
        if micro.forwarded:
            raise GraddotError("the model ran twice since attach_train_batch; one forward a batch")
        if items is not None:
            self._divide_by(micro, items)
        counts = micro.counts
        if self.label_shift == "auto" and labelled:
            counts = self._count(micro.labels, self._shift_of_labels_argument())
        self._use_counts(micro, counts)

    def _divide_by(self, micro: MicroBatch, items: Number) -> None:
        if not has_causal_lm_loss(self.model):
            raise GraddotError(
                "num_items_in_batch changes the loss's mean, and only ForCausalLMLoss is known to"
                " divide by it; leave it out"
            )
        micro.loss_reduction, micro.items = "sum", items

    def _mode(self, rows: int) -> tuple[bool, bool]:
        """Layouts are learnt for each: in a batch of one row little can be told apart."""
        return self.model.training, rows == 1

    def _known_layouts(
        self, micro: MicroBatch, shapes: list[torch.Size]
    ) -> dict[str, Layout] | None:
        mode = self._mode(micro.step.rows)
        return self._layouts.get(mode, self._layouts.get((*mode, *shapes)))

    def _find_layouts(self, micro: MicroBatch, args: Any, kwargs: Any) -> None:
        """Learn how each layer's input holds the rows, from runs of the model as it was.

        Once in each mode; for every new shape where layers see tokens without their rows.
        """
        mode = self._mode(micro.step.rows)
        shapes = [x.shape[1:] for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        layouts = self._known_layouts(micro, shapes)
        if layouts is None:
            names = {id(module): name for name, module in self.model.named_modules()}
            layers = {names[id(module)]: module for module, _ in self._attached}
            self._active = None
            try:
                layouts = find_layouts(
                    self.model, layers, args, kwargs, micro.step.rows,
                    on_layer=functools.partial(self._resolve, micro),
                )  # fmt: skip
                fused = hasattr(self.model.__dict__.get("forward"), "label_shift")  # checks itself
                if micro.step.first and kwargs.get("labels") is not None and not fused:
                    weights = micro.counts if micro.loss_reduction == "mean" else None
                    check_loss(self.model, args, kwargs, micro.step.rows, weights)
            finally:
                self._active = micro
            flat = any(isinstance(layout, int) for layout in layouts.values())
            if layouts:
                self._layouts[(*mode, *shapes) if flat else mode] = layouts
        micro.step.layouts.update(layouts)

    def _end_compiled(self) -> None:
        assert self._active is not None
        self._active.running, self._active.forwarded = False, True

    @uncompiled("graddot: the end of a step's forward")
    def _after_running(self, output: Any) -> Any:
        try:
            return self._end(output)
        except BaseException:
            run_compiled()
            raise

    def _end(self, output: Any) -> Any:
        if self._suspended is not None:
            self._active, self._suspended = self._suspended, None
            return output
        micro = self._active
        if micro is None or not micro.running:
            return output
        micro.running = False
        if output is None:  # the forward raised, and may be tried again
            run_compiled()
            micro.step.shared.clear()
            return None
        micro.forwarded = True
        if self._label_check is None:
            whole = {n: self._whole.get(n, p) for n, p in self._parameters.items()}
            check_parameter_uses(output, whole)
            self._whole = {}
            self._label_check = LabelCheck(output, micro.labels, micro.counts)
        if self._check_reentrant and has_reentrant_checkpoint(tensors_in(output)):
            self._reentrant = ReentrantCheck(self._parameters, ScoredFunction)
            self._reentrant.watch(tensors_in(output))
        self._check_reentrant = self._reentrant is not None
        if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
            output["loss"] = self._tracked(output["loss"])  # type: ignore[index]
        return output
