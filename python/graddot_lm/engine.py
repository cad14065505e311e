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

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import distributed
from .batches import (
    Batch,
    Inputs,
    LossForm,
    Rows,
    filled_rows,
    is_batch,
    join,
    read_batch,
    read_rows,
    unlabelled,
)
from .checks.digests import own_buffers
from .compiling.compiler import prepare_compiler, run_compiled, uncompiled
from .coverage import Coverage, cover
from .directions import (
    Direction,
    LossFunction,
    ValidationLoss,
    direction_norms,
    mean_gradient,
    stack_directions,
)
from .errors import GraddotError
from .loss_scale import LossScale
from .model_forward import ModelForward
from .optimizers import Optimizers
from .sample_rows import SampleRows
from .scores import MicroBatch, Norms, score_rows
from .segments import Segments
from .step import Step


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
        self._loss = LossForm(loss_reduction, label_shift, ignore_index)
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
        if not isinstance(model, nn.Module):
            raise GraddotError(f"the model is a {type(model).__name__}; expected a torch.nn.Module")
        model = distributed.unwrapped(model)
        self.model, self.store = model, store
        self._padding = dict(padding or {})
        self._per_parameter, self._per_token, self.norms = per_parameter, per_token, norms
        self._targets: list[str] | None = None  # None for a single one without a name
        self._val: list[Rows] = []
        if val_data is not None:
            self._val = self._read_val_data(val_data)
        self._parameters, self._coverage = cover(model, exclude)
        self._forward = ModelForward(
            model, self._parameters, self._loss, global_mean, process_group
        )
        weakref.finalize(self, run_compiled, self._forward.number)  # a first step that was given up
        self._direction_norms: Tensor | None = None
        self._scored = {name: self._parameters[name] for name in self._coverage.covered}
        self._optimizers = Optimizers(model, self._scored, None)
        self._pending: list[MicroBatch] = []
        self._logged_norms: list[Norms] = []

    def _read_val_data(self, val_data: Batch | Mapping[str, Batch]) -> list[Rows]:
        by_target: Mapping[str, Any] = {"val": val_data}
        if not is_batch(val_data):
            by_target, self._targets = dict(val_data), list(val_data)  # type: ignore[arg-type]
        if not by_target:
            raise GraddotError("val_data has no target; expected at least one")
        rows = []
        for target, batch in by_target.items():
            rows.append(read_batch(batch, f"validation data {target!r}"))
            if self._loss.count(rows[-1].labels).sum() == 0:
                raise GraddotError(f"validation data {target!r} has no labelled token")
        return rows

    def coverage(self) -> Coverage:
        """Which trainable parameters the scores cover, and their share of the elements."""
        return self._coverage

    # Given directions

    def set_directions(self, directions: Direction | Mapping[str, Direction]) -> None:
        """Dot every training sample with these from now on: {parameter name: tensor of its shape},
        or {target name: such a mapping} for K at once.

        Training rows then run alone. The tensors are held as they are, or copied: to the parameter's
        device and fp32 (fp64 for fp64), and where they share the memory of the parameter or its .grad.
        Raises GraddotError if they do not fit the covered parameters, if validation rows ride along,
        and in the midst of a step.
        """
        if self._val:
            raise GraddotError("validation rows ride along; leave val_data out to give directions")
        self._require_no_step()
        single = [isinstance(value, Tensor) for value in directions.values()]
        is_nested = [isinstance(value, Mapping) for value in directions.values()]
        if not single or not (all(single) or all(is_nested)):
            raise GraddotError(
                "directions are neither all tensors, by parameter name, nor all mappings of such,"
                " by target name"
            )
        named = not single[0]
        by_target: Mapping[str, Any] = directions if named else {"val": directions}
        stacked = stack_directions(by_target, self._parameters, self._coverage.covered)
        self._forward.directions, self._targets = stacked, list(directions) if named else None
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
        loss, reduced as `loss_reduction` says and with the labels shifted as `label_shift` says; by
        default model(**inputs, labels=labels).loss. It runs the model as it is: call `model.eval()`
        first for a gradient without dropout, and inside autocast if training is. What the model's buffers
        and attributes held before they hold afterwards. loss_scale keeps an
        fp16 backward from rounding to zero, as a GradScaler's scale does; where it overflows, a
        smaller one is taken, and the result is not scaled. `.grad` and scores are left alone. Raises
        GraddotError without labelled tokens, if of several batches the first, or the first with a label
        that a shift leaves out, has a loss of others than those counted, and for what is not finite.
        """
        if distributed.is_sharded(self._parameters.values()):  # which may hold a step's gradients
            self._require_no_step()
        if isinstance(batches, Mapping):
            return {
                name: self.compute_directions(own, loss_fn, loss_scale=loss_scale)
                for name, own in batches.items()
            }
        loss_of = ValidationLoss(self.model, self._loss, loss_fn)
        covered = self._coverage.covered
        with self._forward.set_aside(), torch.enable_grad(), own_buffers(self.model):
            return mean_gradient(self._parameters, covered, batches, loss_of, loss_scale)

    def check_loss(self, loss_fn: LossFunction, batch: Batch) -> None:
        """Raise GraddotError unless a loss of your own is what scores take it for: the mean (or sum) over
        the batch's labelled tokens of losses that have nothing to do with other rows.

        loss_fn(model, inputs, labels) is what you pass to `track_loss`, as for `compute_directions`. It runs
        on the batch and on parts of it, without dropout and with the same noise for every row; compared are
        the losses and their gradients at what the model returns. That shows what a checked step cannot see
        in the loss alone, as a division by the batch's positives. The batch should have what rows of
        training differ in: lengths, classes, labels that are ignored. In a sharded model all processes
        call it, between two steps, with the same batch.
        """
        if distributed.is_sharded(self._parameters.values()):
            self._require_no_step()
        with self._forward.set_aside(), torch.enable_grad():
            ValidationLoss(self.model, self._loss, loss_fn).check_rows(batch)

    # Life cycle

    def attach(
        self, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None
    ) -> None:
        """Put the scored layers in place. The optimizer, or several, as Muon's for matrices beside
        AdamW's, are only read: their learning rates, and whether they took the step."""
        devices = sorted({str(p.device) for p in self._parameters.values()})
        if len(devices) > 1:
            raise GraddotError(
                f"trained parameters are on {' and '.join(devices)}, but a step's scores are added up on"
                " one device: put the model on one, and use DDP or FSDP2 for several"
            )
        optimizers = Optimizers(self.model, self._scored, optimizer)
        if self._val:
            optimizers.check_beside_validation()
        self._forward.attach()
        self._optimizers = optimizers
        optimizers.watch(self._after_optimizer_step)

    def detach(self) -> None:
        """Leave the model exactly as it was before `attach`."""
        self._forward.detach()
        self._optimizers.unwatch()
        self._pending = []

    def detach_for_evaluation(self) -> None:
        """Run the model as it was until `reattach_after_evaluation`. Not in the midst of a step."""
        self._require_no_step()
        self.detach()

    def reattach_after_evaluation(self) -> None:
        """Attach again, with the same optimizers."""
        self.attach(self._optimizers.given)

    # One step

    def attach_train_batch(
        self,
        X: Inputs,
        Y: Tensor | None,
        iteration: int,
        batch_idx: Any,
        *,
        segments: Sequence[int] | Tensor | None = None,
        samples: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Announce N training rows; batch_idx holds their sample ids, (N,), for the store.

        X is a tensor or a mapping of tensors, Y the labels, or None if they are X["labels"].
        Between two calls of `aggregate_and_log` there may be several, the micro-batches of one
        optimizer step: their scores come side by side.

        segments are the lengths of N samples that lie one after the other in the batch's one row
        (1, T), as padding-free and packed batches have them (`segment_lengths(position_ids)`);
        scores are then those of each in a row of its own. What is left at the row's end is padding.
        For given directions, without norms. Raises GraddotError, in a checked step, unless the model
        keeps the samples apart; and in any if the loss shifts a sample's first label, which has to
        be ignore_index then, to the sample before. Of labels that are shifted already, what stands
        at a sample's last token is taken for its own target.

        samples, (rows,), are the numbers, 0 to N - 1, of the samples that the rows belong to, where one
        has several, as the two texts of a preference pair. The loss, passed to `track_loss`, is then
        the mean over the N samples (or their sum) of a loss of each one's own rows, which need no
        labels; n_tokens of the store is 1. For given directions, without norms and per_token. A
        checked step raises GraddotError if the loss compares other rows than those of one sample.
        """
        prepare_compiler()
        run_compiled()
        self._require_ready()
        if samples is not None:
            Y = unlabelled(X)
        train = read_rows(X, Y, "the training batch")
        self._val = [rows.beside(train) for rows in self._val]
        parts = [train, *self._val]
        labels = join(
            [Rows({}, p.labels) for p in parts], self._padding, self._loss.ignore_index
        ).labels
        val_rows = [len(part) for part in self._val]
        targets = 1 if self._targets is None else len(self._targets)
        leaf_of = self._optimizers.leaf_names(self._per_parameter)
        first = next(iter(self._parameters.values()))
        tokens, packed, several = None, None, None
        if samples is not None:
            several = self._several(samples, segments, len(train))
        elif segments is not None:
            packed = self._packed(segments, train.labels)
            tokens = packed.tokens
        elif self._per_token:
            if labels.dim() != 2:
                raise GraddotError(
                    f"per_token needs labels of shape (N, T), not {tuple(labels.shape)}"
                )
            tokens = labels.shape[1]
        n = len(train)
        n_samples = len(packed or several or train)
        ids = (n_samples,) if batch_idx is None else tuple(torch.as_tensor(batch_idx).shape)
        if ids != (n_samples,):
            raise GraddotError(
                f"batch_idx has shape {ids}; expected a sample id for each of the {n_samples} samples"
            )
        shape = (targets + 1, n + bool(val_rows)) if self.norms else (targets, n * (tokens or 1))
        dtype = torch.promote_types(first.dtype, torch.float32)
        step = Step(
            rows=len(labels),
            val_rows=val_rows,
            scale=torch.ones((), dtype=dtype, device=first.device),
            tokens=tokens,
            packed=packed is not None,
            sharded=distributed.is_sharded(self._parameters.values()),
            first=self._forward.is_first,
            norms=self.norms,
            buffers=self.model.buffers,
        )
        micro = MicroBatch(
            step=step,
            iteration=iteration,
            sample_ids=batch_idx,
            labels=labels,
            leaf_of=leaf_of,
            dots_shape=shape,
            loss_scale=LossScale(first.device),
            loss_reduction=self._loss.reduction,
            counts=labels.new_zeros(len(labels)),
            direction_norms=self._direction_norms,
            filled=filled_rows(parts),
            segments=packed,
            several=several,
            versions=self._optimizers.versions(),
            applied=self._optimizers.none_took_it(),
        )
        micro.set_counts(micro.labelled(self._loss, int(self._loss.label_shift == 1)))
        self._forward.begin(micro, train.inputs.values())

    def _require_ready(self) -> None:
        """Raise GraddotError unless a micro-batch may begin."""
        if not self._forward.attached:
            raise GraddotError("call attach(optimizer) before attach_train_batch")
        if self._forward.micro is not None:
            raise GraddotError(
                "the previous batch had no prepare_gradients(); call it first, or after an exception"
                " clear_gradients()"
            )
        if self._forward.logged_unapplied and self._has_gradients():
            raise GraddotError(
                "aggregate_and_log() wrote values of 0, for the optimizer had not taken the step, and"
                " its gradients are still there; with gradient accumulation call it once, after"
                " optimizer.step()"
            )
        if self.store is not None:
            self._optimizers.check_one_step(self._pending)
        self._require_trained()
        if not self._val and self._forward.directions is None:
            raise GraddotError(
                "there is no direction; call set_directions first, or give the engine val_data"
            )
        self._optimizers.check_again()

    def _require_trained(self) -> None:
        if frozen := [name for name, p in self._scored.items() if not p.requires_grad]:
            raise GraddotError(
                f"{', '.join(frozen[:5])}{' …' if frozen[5:] else ''}: trained when the engine was made,"
                " but frozen now, so that scores would leave out what coverage() says they have;"
                " detach() the engine and make another one after parameters are frozen"
            )

    def _packed(self, lengths: Sequence[int] | Tensor, labels: Tensor) -> Segments:
        reasons = {
            "labels of shape (1, T)": labels.dim() == 2 and len(labels) == 1,
            "given directions in place of val_data": not self._val,
            "norms=False, for what each token has of a norm does not add up": not self.norms,
            "per_token=False": not self._per_token,
        }
        if missing := [need for need, is_so in reasons.items() if not is_so]:
            raise GraddotError(
                f"segments, the samples of one packed row, need {'; '.join(missing)}; the labels have"
                f" shape {tuple(labels.shape)}. Else give every sample a row of its own"
            )
        as_list = getattr(lengths, "tolist", lambda: list(lengths))  # of arrays and tensors
        return Segments(as_list(), labels.shape[1])

    def _several(
        self, samples: Sequence[int] | Tensor, segments: Sequence[int] | Tensor | None, rows: int
    ) -> SampleRows:
        reasons = {
            "given directions in place of val_data": not self._val,
            "norms=False, for those of its rows are not a sample's": not self.norms,
            "per_token=False": not self._per_token,
            "no segments": segments is None,
        }
        if missing := [need for need, is_so in reasons.items() if not is_so]:
            raise GraddotError(f"samples of several rows need {'; '.join(missing)}")
        several = SampleRows(samples)
        if several.rows != rows:
            raise GraddotError(
                f"samples has {several.rows} entries; expected one for each of the batch's {rows} rows"
            )
        return several

    def prepare_forward_input(self, X: Inputs, Y: Tensor | None = None) -> tuple[Any, Tensor]:
        """The joint batch: training rows, then the validation rows of every target.

        In the form of X; if the labels are in there, they are in what is returned first, too.
        """
        if self._forward.micro is None:
            raise GraddotError("call attach_train_batch before prepare_forward_input")
        train = read_rows(X, Y, "the training batch")
        return join([train, *self._val], self._padding, self._loss.ignore_index).as_given()

    @uncompiled("graddot: track_loss")
    def track_loss(self, loss: Tensor) -> Tensor:
        """The same loss, one number, whose later scaling (GradScaler, 1/accumulation) the scores undo.

        A loss that the caller computes is refused without; `.loss` of a model's output is tracked.
        Raises GraddotError in a checked step if the loss compares samples, and `prepare_gradients` if
        it is a mean with weights, as far as the loss alone shows that; `check_loss` sees more.
        """
        run_compiled()
        return self._forward.tracked(loss)

    def prepare_gradients(self) -> None:
        """Close a micro-batch after its backward. `.grad` is right already; this checks that.

        Raises GraddotError if no backward ran, if the loss counted other tokens than the labels say
        or was not tracked; .grad must not be used then.
        """
        micro = self._forward.finish()
        self._require_trained()  # as a callback may have frozen some since the micro-batch began
        if not micro.loss_scale.factors():
            raise GraddotError(
                "the loss is none that the model returned, nor was it passed to track_loss, so that its"
                " scale cannot be told; before you scale it: loss = engine.track_loss(loss)"
            )
        self._optimizers.note_rates(micro)
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

        With a store, one row a sample is appended: step, sample_id, n_tokens, dot, lr, value
        and applied, norm and cosine with `norms=True`, and the further `columns` given here, (N,)
        each. Values are those of the optimizer's step, so this comes after it, and are 0, with
        applied False, if a GradScaler skipped it; gradient_scale (a number or a 0-dim tensor) is
        what the gradients were multiplied by before it, as by clipping. Nothing here waits for a
        GPU; whether the store does is its own affair.
        """
        if self._forward.micro is not None:
            self.prepare_gradients()
        self._require_pending()
        scores = self._shaped([micro.scores() for micro in self._pending])
        if self.store is not None:
            self._optimizers.require_given(self._pending)
            rows = score_rows(self._pending, self._targets, columns or {}, gradient_scale)
            for values, iteration in rows:
                self.store.append(values, iteration)
            self._forward.logged_unapplied = any(
                taken is False for micro in self._pending for taken in micro.applied
            )
        self._logged_norms = [micro.norms() for micro in self._pending] if self.norms else []
        self._pending = []
        self._optimizers.forget_step()
        return scores

    def clear_gradients(self) -> None:
        """Drop all gradients, and the scores of a step that is not to count."""
        self._forward.give_up()
        self.model.zero_grad(set_to_none=True)
        self._pending = []
        self._optimizers.forget_step()

    # Inside

    def _norms(self) -> list[Norms]:
        if not self.norms:
            raise GraddotError("norms and cosines need GradDotProdEngine(..., norms=True)")
        self._close_micro_batch()
        if not self._logged_norms:
            self._require_pending()
        return [micro.norms() for micro in self._pending] or self._logged_norms

    def _has_gradients(self) -> bool:
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        return any(bool(distributed.own_part(grad).any()) for grad in gradients)

    def _close_micro_batch(self) -> None:
        """Where the caller left it out after the backward: what is read has that one's samples, too."""
        if self._forward.micro is not None and self._forward.micro.step.has_dots:
            self.prepare_gradients()

    def _require_pending(self) -> None:
        self._close_micro_batch()
        if not self._pending:
            raise GraddotError("no scores: run a step from attach_train_batch to its backward")

    def _require_no_step(self) -> None:
        if self._forward.micro is not None or self._pending:
            raise GraddotError("a step is under way; call aggregate_and_log() first")

    def _shaped(self, dots: list[Tensor]) -> Tensor:
        joined = torch.cat(dots, 1)
        return joined[0] if self._targets is None else joined

    def _after_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        micros = list(self._pending)
        if self._forward.micro is not None and self._forward.micro.step.has_dots:
            micros.append(self._forward.micro)  # whose prepare_gradients() is still to come
        given = self._optimizers.note_step(optimizer, micros)
        if given and not micros and self._forward.logged_unapplied:
            raise GraddotError(
                "the optimizer's step came after aggregate_and_log(), which wrote values of 0 for"
                " a step that was not taken; call aggregate_and_log() after the step"
            )
