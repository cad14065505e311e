"""The checks of a first step, made again now and then: what they look at, and when they are due."""

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .. import distributed
from ..averaging import Averaging
from ..batches import has_causal_lm_loss
from ..checkpointing import ReentrantCheck, has_reentrant_checkpoint
from ..errors import GraddotError
from ..rules.layers import ScoredFunction
from ..sample_rows import SampleRows
from ..scored_layers import ScoredLayers
from ..scores import MicroBatch
from ..segments import Segments, check_apart
from .backward_check import check_backward
from .digests import counts_of, kept_numbers, remembered_values
from .outputs import check_counts, check_losses, check_memory, check_padding, is_divided
from .own_loss import ForwardSpan, check_class_weights, check_samples_apart, ignored_labels
from .parts import ModelInputs
from .verify import BufferCheck, FrozenCheck, LabelCheck, check_parameter_uses, tensors_in

# Finished micro-batches after which the next is checked like the first: what a model does may
# depend on its data, and a check costs a few forward passes.
CHECKED_AFTER = {10**k for k in range(1, 10)}


def _give_back_freed() -> None:
    """To the operating system the memory that checks have freed, where the C library is glibc: it would
    keep what is below 32 MiB, and the step's larger tensors would come on top."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class FirstStep:
    """Runs the model as it was: to be called outside of any step."""

    def __init__(
        self, model: nn.Module, layers: ScoredLayers, averaging: Averaging, ignore_index: int
    ) -> None:
        self._model, self._layers, self._averaging = model, layers, averaging
        self._ignore_index = ignore_index
        self.thorough = True  # until a check left out rows in all ways; then by halves
        self.divided = has_causal_lm_loss(model)  # the model's loss, by num_items_in_batch
        self._undecided = False
        self._unlabelled = False  # whether the checked step under way has no labelled token
        self._finished = 0
        self._padding_checked = False  # whether there were rows that `padding` filled up
        self._apart_checked = False  # whether there was a packed row of several samples
        self._labels: LabelCheck | None = None
        self._ignored: set[int] = set()  # labels that a loss ignores, counted, and not met so far
        self._frozen: FrozenCheck | None = None  # as they were before the checks under way
        self._buffers: BufferCheck | None = None  # as they were before the forward under way
        self._whole: dict[str, nn.Parameter] = {}
        self._by_sample: list[bool] = []  # of each of the model's outputs whether it is
        self._returned: list[Tensor] = []  # those that are, of the step under way
        self._several: SampleRows | None = None  # the samples of several rows of that step
        # What is wrong with losses that the model returns, or keeps in its modules' attributes.
        self._problems: dict[int | str, str] = {}
        self._mixed: GraddotError | None = None  # what is wrong in the backward
        self._used: list[str] = []  # of them those that the backward reached
        self._span: ForwardSpan | None = None  # of the step's forward, if it is checked
        self._reentrant: ReentrantCheck | None = None
        self._check_reentrant = True

    @property
    def is_due(self) -> bool:
        """Whether the next step is checked: no forward of a step has ended since that was due."""
        return self._labels is None

    def has_new(self, micro: MicroBatch) -> bool:
        """Whether there is in it what no step had before, which is checked whenever it comes."""
        ignored = self._has_ignored(micro)
        return ignored or self._has_new_padding(micro) or self._has_new_packing(micro)

    def _has_new_padding(self, micro: MicroBatch) -> bool:
        return bool(micro.filled) and not self._padding_checked

    def _has_new_packing(self, micro: MicroBatch) -> bool:
        """Whether it is the first packed row of several samples."""
        several = micro.segments is not None and len(micro.segments) > 1
        return several and not self._apart_checked

    def _has_ignored(self, micro: MicroBatch) -> bool:
        """Whether a label, which is counted, is one that the loss was seen to ignore."""
        return any(bool((micro.labels == x).any()) for x in self._ignored)

    def _note_ignored(self, loss: Tensor) -> None:
        self._ignored |= ignored_labels(loss) - {self._ignore_index}

    # Around the model's forward

    def begin(self) -> None:
        """The model is about to be run on parts of the batch, or is not, and then in the step."""
        self._span = ForwardSpan() if self.is_due else None
        self._frozen = FrozenCheck(self._model) if self.is_due else None

    def check_frozen(self) -> None:
        """Raise GraddotError if the runs of the model since have changed what is frozen."""
        if self._frozen is not None:
            self._frozen.compare()
            self._frozen = None

    def forward_begins(self) -> None:
        if self._span is not None:
            self._span.begin()

    def see_whether_divided(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Learn whether the model's loss is divided by num_items_in_batch. If no process can tell
        yet, the next step is checked again."""
        seen = is_divided(self._model, args, kwargs)
        distributed.unshard(self._model)
        votes = [None, False, True]
        vote = self._averaging.largest(votes.index(seen))
        self._undecided = vote == 0
        if not self._undecided:
            self.divided = bool(votes[vote])

    def before_layouts(self, micro: MicroBatch, inputs: ModelInputs) -> None:
        if micro.filled and micro.step.first or self._has_new_padding(micro):
            for filled in micro.filled if not micro.step.sharded else []:
                check_padding(self._model, *inputs.both, inputs.rows, filled, inputs.entries)
            self._padding_checked = True

    def before_forward(self, micro: MicroBatch, inputs: ModelInputs) -> None:
        """Run the model on parts of the batch. It is done before the forward, for a hook may keep what
        it sees for the loss: the last to be seen is the step's."""
        new_packing = self._has_new_packing(micro)
        self._problems, self._mixed, self._used, self._by_sample = {}, None, [], []
        if self.is_due and micro.step.first or new_packing:
            self._run_losses(micro, inputs)
            distributed.unshard(self._model)
        if (self.is_due or new_packing) and not micro.step.sharded:
            try:
                self._check_backward(micro, inputs)
            except GraddotError as error:
                self._mixed = error.with_traceback(None)
        if self.is_due or new_packing:
            _give_back_freed()
        self._buffers = None
        if micro.step.first and micro.step.val_rows:
            held, counts = remembered_values(self._model), counts_of(self._model)
            self._buffers = BufferCheck(self._model, held, counts)

    def see_whole(self) -> None:
        """Note the parameters that are whole now: of a sharded model others than its own."""
        self._whole.update(distributed.plain_parameters(self._model))

    def after_layer(self, out: Any) -> None:
        if self._reentrant is not None:
            self._reentrant.watch(tensors_in(out))

    def after_forward(
        self, micro: MicroBatch, inputs: ModelInputs, output: Any, directions_given: bool
    ) -> None:
        if self._span is not None:
            self._span.end([*tensors_in(output), *kept_numbers(self._model).values()])
        if self.is_due:
            losses = output.get("loss") if isinstance(output, Mapping) else output
            for x in tensors_in(losses):
                if x.dim() == 0 and x.requires_grad:
                    self._check_finite(x, micro.counts)
                    self._note_ignored(x)
            self._compare_buffers(inputs)
            self._whole = {
                name: self._whole.get(name, p)
                for name, p in self._layers.parameters.items()
                if micro.judged(name)
            }
            check_parameter_uses(output, self._whole)
        self._check_losses(micro, output)
        self._unlabelled = False
        if self.is_due:
            self._unlabelled = not self._averaging.agreed(bool(micro.counts.any()))
        ignores = self._has_ignored(micro)
        if self.is_due or ignores:
            first = self._finished == 0
            self._labels = LabelCheck(
                output, micro.labels, micro.counts, micro.summed, first, ignores
            )
        if self._check_reentrant and has_reentrant_checkpoint(tensors_in(output)):
            if directions_given:
                distributed.check_static_graph()
            self._reentrant = ReentrantCheck(self._layers.parameters, ScoredFunction)
            self._reentrant.watch(tensors_in(output))
        self._check_reentrant = self._reentrant is not None

    def _check_finite(self, loss: Tensor, counts: Tensor) -> None:
        """Raise GraddotError if nothing can be told from the first step, by its loss. A run that diverges
        later goes on as without scores."""
        loss = loss.detach()
        if self._finished == 0 and counts.any() and not loss.isfinite():
            raise GraddotError(
                f"the loss of the first step is {float(loss):.6g}, and what the model does with"
                " samples cannot be checked by that. Look for NaN or infinity among the weights and the"
                " inputs, or leave this batch out (engine.clear_gradients()): then the next is checked"
            )

    def _compare_buffers(self, inputs: ModelInputs) -> None:
        if self._buffers is not None:
            self._buffers.compare(self._model)
            held, agreed = self._buffers.held, self._averaging.agreed
            check_memory(self._model, *inputs.both, held, agreed)
            half = inputs.take(inputs.both, range(inputs.rows // 2))
            check_counts(self._model, half, self._buffers.counts, agreed)
            self._buffers = None

    def _run_losses(self, micro: MicroBatch, inputs: ModelInputs) -> None:
        samples, take = _samples(micro, inputs)
        several = micro.several
        if several is not None:
            samples = len(several)
            take = lambda arguments, which: inputs.take(arguments, several.rows_of(which))
        if micro.segments is not None:
            self.check_packed(*inputs.both, micro.segments)
        fused = hasattr(self._model.__dict__.get("forward"), "label_shift")  # checks itself
        if not fused or micro.segments is not None:
            weights = micro.counts if micro.loss_reduction == "mean" else None
            of_rows = several is None and micro.segments is None
            # Processes that share the model have to run it equally often.
            known = inputs.numbers if of_rows and not micro.step.sharded else {}
            self._problems = check_losses(
                self._model, *inputs.both, samples, weights, take, known,
                thorough=inputs.thorough, runs=inputs.runs,
            )  # fmt: skip

    def _check_losses(self, micro: MicroBatch, output: Any) -> None:
        """Raise GraddotError if the model's loss is not that of its rows; see to it that other numbers
        of which that is so are refused if the backward reaches them."""
        if not self._problems:
            if self._mixed is not None:
                raise self._mixed
            return
        numbers = kept_numbers(self._model)
        numbers.update(enumerate(tensors_in(output)))
        loss = output.get("loss") if isinstance(output, Mapping) else output
        for key, problem in self._problems.items():
            x = numbers.get(key)
            if x is None or x.grad_fn is None:
                continue
            if x is loss and micro.several is None:  # whose own loss is not that of the rows
                raise GraddotError(problem)
            x.register_hook(functools.partial(self._note_used, problem))

    def _note_used(self, problem: str, grad: Tensor | None) -> None:
        if grad is not None and grad.any():  # DDP's backward reaches what no loss uses, too
            self._used.append(problem)

    def _check_backward(self, micro: MicroBatch, inputs: ModelInputs) -> None:
        samples, take = _samples(micro, inputs)
        lengths = None if micro.segments is None else micro.segments.lengths
        if samples > 1:
            layers, layouts = self._layers.judged(), micro.step.layouts
            by_sample = check_backward(
                self._model, layers, layouts, *inputs.both, samples, take, lengths,
                loss_is_of_rows=micro.several is None,
            )  # fmt: skip
            self._by_sample = by_sample if lengths is None else []

    def check_packed(self, args: Any, kwargs: Mapping[str, Any], segments: Segments) -> None:
        """Raise GraddotError unless the model keeps apart the samples that share a row."""
        if self._averaging.sharded:
            raise GraddotError(
                "the model is sharded, and would have to be run once for each sample of a packed row,"
                " of which processes have other numbers, to see whether they are kept apart; give"
                " every sample a row of its own"
            )
        check_apart(self._model, self._layers.modules(), args, kwargs, segments)

    # What becomes of the step

    def see_returned(self, output: Any, micro: MicroBatch) -> None:
        """Note what a loss of the caller's own may be made of."""
        pairs = zip(tensors_in(output), self._by_sample, strict=False)
        rows, self._several = micro.step.rows, micro.several
        self._returned = [x for x, by in pairs if by and x.requires_grad and len(x) == rows]

    def check_own_loss(self, loss: Tensor, counts: Tensor) -> None:
        """Raise GraddotError if a parameter reaches the caller's loss behind its layer's back, if it
        compares samples, or if it is no number. counts (rows,) are labelled tokens."""
        self._check_finite(loss, counts)
        self._note_ignored(loss)
        if self._span is not None:
            self._span.check(loss)
        check_parameter_uses(loss, self._whole)
        check_class_weights(loss, len(counts if self._several is None else self._several))
        check_samples_apart(loss, self._returned, self.thorough, self._several)
        if self._labels is not None:
            self._labels.watch(loss)

    def finish(self, micro: MicroBatch) -> None:
        """After the backward. Raises GraddotError if a check of it failed."""
        if self._used:
            raise GraddotError(self._used[0])
        if self._mixed is not None:
            raise self._mixed
        if self._labels is not None:
            if self._labels.problem is not None:
                raise GraddotError(self._labels.problem)
            weights, self._labels.weights = self._labels.weights, []
            of_losses, self._labels.of_losses = self._labels.of_losses, []
            scale, is_mean = micro.loss_scale, micro.loss_reduction == "mean"
            if scale.is_own and is_mean and micro.segments is None and micro.several is None:
                for found in weights:
                    found.check(micro.counts, micro.n, scale.factor())
                for equal in of_losses:
                    equal.check(micro.counts, scale.factor())
        if self._reentrant is not None:
            check, self._reentrant = self._reentrant, None
            self._check_reentrant = not check.finish()
        self._ignored = {x for x in self._ignored if not (micro.labels == x).any()}
        self._apart_checked |= micro.segments is not None and len(micro.segments) > 1
        if self._unlabelled:  # its loss says nothing: the next is checked in its place
            self._labels = None
        else:
            self.thorough &= not micro.step.first or micro.step.rows == 1
            self._finished += 1
            if self._finished in CHECKED_AFTER or self._undecided:
                self._labels = None
        self._whole, self._returned, self._span = {}, [], None

    def give_up(self, micro: MicroBatch | None) -> None:
        if micro is not None and micro.step.first:
            self._labels = None  # what was not finished was not checked
        self._returned, self._span = [], None
        self._mixed, self._used = None, []
        if self._reentrant is not None:
            self._reentrant.remove()
            self._reentrant = None


def _samples(
    micro: MicroBatch, inputs: ModelInputs
) -> tuple[int, Callable[[Any, Sequence[int]], Any]]:
    """How many there are, rows or in one, and what takes some of them out of the inputs."""
    if micro.segments is None:
        return inputs.rows, inputs.take
    return len(micro.segments), micro.segments.take
