"""What an attached engine does before, in and after the forward of its model.

The scored layers stand in the place of the model's own; the hooks around the model's forward see to
it that they know how the rows lie in their inputs, and that a first step is checked.
"""

import contextlib
import copyreg
import functools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import distributed
from .averaging import Averaging
from .batches import LossForm
from .checkpointing import recomputing
from .checks.digests import own_buffers, own_inputs, own_random, uncached
from .checks.first_step import FirstStep
from .checks.layout_search import LayoutSearch
from .checks.parts import ModelInputs
from .compiling import compiled
from .compiling.compiler import run_compiled, run_uncompiled, skipped, uncompiled
from .compiling.graph_layers import InGraphLayers
from .compiling.tracing import rows_of, trace_after, trace_before
from .errors import GraddotError
from .scored import ScoredForward
from .scored_layers import ScoredLayers
from .scores import MicroBatch, Number
from .segments import Segments
from .step import Step


def _reduced(model: nn.Module) -> Any:
    """How a model is copied and pickled, by its class's own way: without the hooks of an engine."""
    reduced = model.__reduce_ex__(2)
    state = reduced[2] if len(reduced) > 2 else None
    if not isinstance(state, dict) or "_forward_hooks" not in state:
        return reduced
    ours = {
        number
        for hooks in (state["_forward_hooks"], state["_forward_pre_hooks"])
        for number, hook in hooks.items()
        if isinstance(getattr(hook, "__self__", None), ModelForward)
    }
    kept = {
        name: OrderedDict((number, x) for number, x in hooks.items() if number not in ours)
        for name, hooks in state.items()
        if name.startswith("_forward_")
    }
    return *reduced[:2], {**state, **kept}, *reduced[3:]


class ModelForward:
    """The scored layers of one model, and the micro-batch that runs through them.

    parameters are the covered and the excluded ones by name; see `GradDotProdEngine` for the rest.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        loss: LossForm,
        global_mean: bool,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self.model, self.loss, self.global_mean = model, loss, global_mean
        self.directions: dict[int, Tensor] | None = None  # (K, *shape) by id of the parameter
        # Under way, from `begin` to `finish`.
        self.micro: MicroBatch | None = None
        # Rows of a step that the optimizer had not taken were logged, and none began since.
        self.logged_unapplied = False
        self._suspended: MicroBatch | None = None  # while the model is evaluated in its midst
        self._hooks_in_graph = False  # whether a compiled graph has them
        self._unhooked = False  # a forward around which the hooks do nothing
        self._postponed: tuple[MicroBatch, Any, Any] | None = None
        self._aside = contextlib.ExitStack()  # what the forward outside of it is not to change
        self._inputs: ModelInputs | None = None  # of the forward under way
        self._parameters = parameters
        self._averaging = Averaging(parameters, process_group)
        self._layers = ScoredLayers(model, parameters, self._scored_forward)
        self._layouts = LayoutSearch(
            model, self._layers, self._averaging, self._resolve, self._in_step
        )
        self._checks = FirstStep(model, self._layers, self._averaging, loss.ignore_index)
        self.in_graph = InGraphLayers(self._layers, parameters)
        self._hooks: list[Any] = []
        # For graphs that torch.compile makes of the model.
        self.number, self.key = next(compiled.numbers), compiled.new_owner(self)
        self.clock = torch.zeros((), dtype=torch.int64, device="cpu")  # what orders a compiled step
        self.sites: list[Any] = []
        self.one_row = False  # whether the batch under way has one row

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelForward":
        """Itself: a model whose class copies it in a way of its own keeps the hooks, which ignore all
        but this model."""
        return self

    # In and out of the model

    @property
    def attached(self) -> bool:
        return self._layers.attached

    def attach(self) -> None:
        """Put the scored layers in place."""
        self._layers.attach()
        copyreg.dispatch_table.setdefault(type(self.model), _reduced)
        self._hooks = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward, always_call=True),
        ]

    def _scored_forward(
        self, module: nn.Module, name: str, rule: Callable[..., Any]
    ) -> ScoredForward:
        begin, end = self._begin_layer, self._checks.after_layer
        scored = ScoredForward(module, name, rule, begin, end, self)
        scored.graddot_head = functools.partial(self._begin_head, module, name)  # type: ignore[attr-defined]
        return scored

    def detach(self) -> None:
        """Leave the model exactly as it was before `attach`."""
        self._layers.detach()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.give_up()
        rows_of.pop(self.number, None)
        self.in_graph.forget()

    # One micro-batch

    def begin(self, micro: MicroBatch, inputs: Collection[Tensor]) -> None:
        """The next forward of the model, with a graph, is this micro-batch's, whose training rows have
        these inputs."""
        self._layers.check_same()
        self.micro, self.logged_unapplied = micro, False
        labels = micro.labels
        rows_of[self.number] = torch.empty(len(labels), dtype=torch.bool, device="cpu")
        self.one_row = len(labels) == 1
        self.in_graph.begin(micro, self.directions)
        unseen = self._layouts.is_new(len(labels), labels)
        # Outside of a graph the hooks learn of others; all are noted, for the model may get any.
        others = [self._layouts.is_new(len(labels), x) for x in inputs]
        unseen |= self._hooks_in_graph and any(others)
        if self.is_first or unseen or self._checks.has_new(micro):
            run_uncompiled(self.number)  # the checks of a first step look at the model uncompiled

    @property
    def is_first(self) -> bool:
        """Whether the next step is checked."""
        return self._checks.is_due

    @property
    def thorough(self) -> bool:
        """Whether checks leave out rows in all ways, or by halves."""
        return self._checks.thorough

    def finish(self) -> MicroBatch:
        """The micro-batch after its backward. Raises GraddotError if a check of it failed."""
        run_compiled()
        micro = self.micro
        if micro is None or not micro.forwarded:
            raise GraddotError("no forward pass of the model ran since attach_train_batch")
        if micro.step.in_backward:
            raise GraddotError(
                "the backward pass raised before it was through, so that scores and .grad are of a"
                " part of the model; call clear_gradients()"
            )
        micro.step.end()
        self.in_graph.collect(micro)
        if not micro.step.has_dots:
            raise GraddotError("no backward pass ran since the forward, or none reached the layers")
        micro.loss_scale.check()
        held = [uses.name for uses in micro.step.shared.values() if uses.held is not None]
        if held:
            raise GraddotError(
                f"{', '.join(held)}: the loss depends on the shared weight's linear layer, but not"
                " on its embedding; their gradient cannot be completed"
            )
        if micro.step.first:
            self.in_graph.judge(micro)
        self._checks.finish(micro)
        self.micro = None
        return micro

    def give_up(self) -> None:
        """Forget the micro-batch under way."""
        run_compiled()
        self._checks.give_up(self.micro)
        self.in_graph.give_up()
        self.micro = None

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside of it the model runs as it was, outside of any step."""
        kept = self.micro, self.logged_unapplied
        self.micro = None
        try:
            with uncached():
                yield
        finally:
            self.micro, self.logged_unapplied = kept

    @contextlib.contextmanager
    def _in_step(self, micro: MicroBatch) -> Iterator[None]:
        """Inside of it the model's layers belong to this micro-batch; the hooks around it do nothing."""
        kept, self.micro, self._unhooked = self.micro, micro, True
        try:
            yield
        finally:
            self.micro, self._unhooked = kept, False

    def tracked(self, loss: Tensor) -> Tensor:
        """The loss, whose later scaling shows in a leaf of the micro-batch under way."""
        if self.micro is None:
            return loss
        if loss.numel() != 1:  # weights, or a sum, would be taken for its scale
            raise GraddotError(
                f"track_loss got a loss of shape {tuple(loss.shape)}, whose scale cannot be told; reduce"
                " it to one number first"
            )
        if self.micro.step.first:
            self._checks.check_own_loss(loss, self.micro.counts)
        return self.micro.loss_scale.tracked(loss)

    def check_packed(self, args: Any, kwargs: Any, segments: Segments) -> None:
        """Raise GraddotError unless the model keeps apart the samples that share a row."""
        with self.set_aside():
            self._checks.check_packed(args, kwargs, segments)

    # A layer's forward

    def scoring(self) -> bool:
        """Whether a layer that runs now belongs to a step."""
        return self.micro is not None and torch.is_grad_enabled()

    def _begin_layer(self, module: nn.Module, name: str) -> Step | None:
        """The step that a layer's forward belongs to, with the layer's parameters in it."""
        micro = self.micro
        # Without a graph only the first run of a reentrant checkpoint belongs to the step.
        if micro is None or not (micro.step.running or torch.is_grad_enabled()):
            return None
        self._resolve(micro, module, name)
        return micro.step

    def require_layout(self, step: Step, name: str) -> None:
        """See to it that a layer, which is about to run, knows how its input holds the rows."""
        if self.micro is not None and step.layouts and name not in step.layouts and not step.trial:
            with self.set_aside():
                self._layouts.learn_late(step, self._inputs, name)

    def _resolve(self, micro: MicroBatch, module: nn.Module, name: str) -> None:
        """Give a layer's parameters, as they are in this forward, what goes by their names."""
        step = micro.step
        for owned, parameter in self._layers.parameters_in(name):
            if id(parameter) in step.names:
                continue
            known = self._parameters[owned]
            distributed.check_plain(owned, parameter, known)
            step.names[id(parameter)] = owned
            if owned in micro.leaf_of:
                step.leaf_of[id(parameter)] = micro.leaf_of[owned]
                if self.directions is not None:
                    step.directions[id(parameter)] = self.directions[id(known)]
        if self.is_first and step.sharded:  # whole ones take the place of shards as layers run
            self._checks.see_whole()

    def _begin_head(
        self, module: nn.Module, name: str, labelled: Tensor, mean: bool
    ) -> Step | None:
        """The same for the fused head, which runs in this layer's place and sees which tokens are
        labelled, (rows, T), and whether its loss is their mean."""
        step = self._begin_layer(module, name)
        if step is not None:
            assert self.micro is not None
            if self.micro.several is not None:
                raise GraddotError(
                    "the fused head's loss is a mean over tokens, and samples of several rows have a loss of"
                    " their own; do not pass the model labels, so that it returns its logits"
                )
            expected = self.micro.loss_reduction
            if mean != (expected == "mean"):
                raise GraddotError(
                    f"the fused head's loss is a {'mean' if mean else 'sum'} over labelled tokens,"
                    f" but the engine expects a {expected}; pass loss_reduction="
                )
            if not step.trial:  # which other processes may not make
                self._count_by_loss(self.micro, self.micro.summed(labelled))
        return step

    def _count_by_loss(self, micro: MicroBatch, counts: Tensor) -> None:
        """The loss's own counts of labelled tokens: no guess about its shift is needed."""
        if self.loss.label_shift != "auto" and micro.step.first:
            wrong = (counts != micro.counts.to(counts.device)).nonzero().flatten().tolist()
            if wrong:
                row = wrong[0]
                raise GraddotError(
                    f"row {row} of the joint batch has {int(micro.counts[row])} labelled tokens"
                    f" by its labels and label_shift={self.loss.label_shift}, but the loss used"
                    f" {int(counts[row])}"
                )
        self._use_counts(micro, counts)

    def _use_counts(self, micro: MicroBatch, counts: Tensor) -> None:
        """Labelled tokens of each sample, and the weight of one in the gradient of all processes."""
        n_train = None
        if self.global_mean or (micro.loss_reduction == "sum" and micro.items is None):
            own = counts[: micro.n].sum().to(micro.step.scale.device)
            n_train = self._averaging.summed(own)
        micro.set_counts(counts, self._averaging.world_size(), n_train)

    # The model's forward

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
        micro = self.micro
        if self._unhooked:
            return
        if micro is None:
            self.logged_unapplied &= not torch.is_grad_enabled()  # a step without scores
            return
        if not torch.is_grad_enabled():  # an evaluation in the midst of the step
            self.micro, self._suspended = None, micro
            return
        if recomputing():
            if micro.forwarded:
                return
            raise GraddotError(
                "the whole model runs inside a reentrant checkpoint, where its layers are not seen"
                " in time; checkpoint parts of it, or pass use_reentrant=False"
            )
        self._checks.begin()
        items, labelled = kwargs.get("num_items_in_batch"), kwargs.get("labels") is not None
        if micro.step.first and not micro.forwarded and items is not None and labelled:
            with self.set_aside():
                self._checks.see_whether_divided(args, kwargs)
        self._start(micro, items, labelled)
        inputs = ModelInputs(args, kwargs, micro.step.rows, self._checks.thorough)
        as_one_layer = self._layers.include_model
        with self.set_aside():
            try:
                self._checks.before_layouts(micro, inputs)
                self._layouts.learn(micro, inputs)
                self._checks.before_forward(micro, inputs)
            finally:  # and what they say may come of that
                self._checks.check_frozen()
        self._inputs = inputs
        if self._layers.include_model and not as_one_layer:
            # The forward that PyTorch is about to call is the one that was there before: it runs
            # outside of the step, and the new one after it.
            self.micro, self._postponed = None, (micro, *own_inputs((args, kwargs)))
            self._aside.enter_context(own_buffers(self.model))
            self._aside.enter_context(own_random())
            return
        micro.step.running = True
        self._checks.forward_begins()

    def begin_compiled(self, inputs: list[Tensor], items: Any, labelled: bool) -> None:
        """The same from inside a compiled graph."""
        micro, self._hooks_in_graph = self.micro, True
        if micro is None:
            raise GraddotError("a compiled model ran outside of the step that it was compiled for")
        layouts = self._layouts.of(micro.step.rows, inputs)
        if layouts is None:
            shapes = [x.shape[1:] for x in inputs]
            raise GraddotError(
                f"no uncompiled step ran with inputs of these shapes, {shapes}, which the check that"
                " samples are kept apart needs; compile the model, torch.compile(model), and no code"
                " around it, or pass attach_train_batch labels of the same shape as those that the"
                " model gets"
            )
        micro.step.layouts.update(layouts)
        if micro.step.running:  # the forward raised, and is tried again
            micro.step.shared.clear()
        self._start(micro, items, labelled)
        micro.step.running = True

    def _start(self, micro: MicroBatch, items: Number | None, labelled: bool) -> None:
        if micro.forwarded:
            raise GraddotError(
                "the model ran twice since attach_train_batch; one forward a batch. Where a sample has"
                " several inputs, as the two texts of a pair, run them as rows of one batch (samples=)"
            )
        # What a loss of the caller's own is made of; labels that the model gets are for its own.
        of_tokens = micro.several is None
        if items is not None and of_tokens and (self._checks.divided or not labelled):
            micro.loss_reduction, micro.items = "sum", items
        counts = micro.counts
        if self.loss.label_shift == "auto" and labelled:
            counts = micro.labelled(self.loss, self.loss.shift_by(self.model))
        self._use_counts(micro, counts)

    def end_compiled(self) -> None:
        """The end of a forward inside a compiled graph."""
        assert self.micro is not None
        self.micro.step.running, self.micro.forwarded = False, True

    @uncompiled("graddot: the end of a step's forward")
    def _after_running(self, output: Any) -> Any:
        try:
            return self._end(output)
        except BaseException:
            run_compiled()
            raise

    def _run_postponed(self) -> Any:
        assert self._postponed is not None
        self._aside.close()
        (self.micro, args, kwargs), self._postponed = self._postponed, None
        self.micro.step.running = True
        self._checks.forward_begins()
        with self._in_step(self.micro):
            return self.model(*args, **kwargs)

    def _end(self, output: Any) -> Any:
        if self._suspended is not None:
            self.micro, self._suspended = self._suspended, None
            return output
        if self._postponed is not None and not self._unhooked:
            output = self._run_postponed()
        micro = self.micro
        if micro is None or not micro.step.running or self._unhooked:
            return output
        micro.step.running = False
        if output is None:  # the forward raised, and may be tried again
            run_compiled()
            micro.step.shared.clear()
            self._inputs = None
            return None
        micro.forwarded = True
        assert self._inputs is not None
        with self.set_aside():
            self._checks.after_forward(micro, self._inputs, output, self.directions is not None)
        self._inputs = None
        output = micro.loss_scale.tracked_output(output, checked=micro.step.first)
        self._checks.see_returned(output, micro)
        return output
