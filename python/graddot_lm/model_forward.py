"""What an attached engine does before, in and after the forward of its model.

The scored layers stand in the place of the model's own; the hooks around the model's forward learn
how the rows lie in every layer's input, and check in the first step that all is as assumed.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from . import compiled, distributed
from .backward_check import check_backward
from .batches import LossForm, has_causal_lm_loss
from .checkpointing import ReentrantCheck, has_reentrant_checkpoint, recomputing
from .compiler import run_compiled, run_uncompiled, skipped, uncompiled
from .digests import held_values, own_buffers, own_inputs, own_random
from .errors import GraddotError
from .found_mixtures import FoundMixtures, has_forward
from .general import ProvenRule, caller_rule
from .layers import ScoredFunction, Step
from .mixtures import ROUTED, mixture_rule
from .outputs import check_loss, check_memory, check_outputs, check_padding, is_divided
from .parts import Entries, entries_of, splits_of, take_inputs
from .rows import KnownLayouts, Layout, MixedSamples, find_layouts
from .rules import rule_for
from .scored import ScoredForward
from .scores import MicroBatch, Number
from .segments import Segments, check_apart
from .tracing import rows_of, trace_after, trace_before
from .verify import (
    BufferCheck,
    LabelCheck,
    check_parameter_uses,
    check_same_model,
    foreign_uses,
    tensors_in,
)

# Finished micro-batches after which the next is checked like the first: what a model does may
# depend on its data, and a check costs a few forward passes.
CHECKED_AFTER = {10**k for k in range(1, 10)}


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
        self.model, self.loss = model, loss
        self.global_mean, self.process_group = global_mean, process_group
        self.directions: dict[int, Tensor] | None = None  # (K, *shape) by id of the parameter
        # Under way, from `begin` to `finish`.
        self.micro: MicroBatch | None = None
        # Rows of a step that the optimizer had not taken were logged, and none began since.
        self.logged_unapplied = False
        self._suspended: MicroBatch | None = None  # while the model is evaluated in its midst
        self._parameters = parameters
        names = {id(p): name for name, p in parameters.items()}
        # By module: where the parameters are that it holds, and their names in the model; a tied
        # one has one name in all places, and a frozen one none.
        self._places = {
            module_name: [
                (part, {key: names.get(id(p)) for key, p in part._parameters.items()})
                for part in module.modules()
                if part._parameters
            ]
            for module_name, module in model.named_modules()
        }
        rules = {name: rule_for(module) for name, module in model.named_modules()}
        self._rules = {name: rule for name, rule in rules.items() if rule is not None}
        self._mixtures = FoundMixtures(model)
        self._forwards: dict[str, ScoredForward] = {}
        self._attached: list[tuple[nn.Module, Any]] = []
        self._hooks: list[Any] = []
        # The first step's checks, made again now and then, and what they found.
        self._finished = 0
        self._thorough = True  # until a check left out rows in all ways; then by halves
        self._divided = has_causal_lm_loss(model)  # the model's loss, by num_items_in_batch
        self._undecided = False
        self._padding_checked = False  # whether there were rows that `padding` filled up
        self._apart_checked = False  # whether there was a packed row of several samples
        self._probing = self._followed_whole = False
        self._postponed: tuple[MicroBatch, Any, Any] | None = None
        self._inputs: tuple[Any, Any] | None = None  # of the forward under way
        self._runs = 0  # of a sharded model in a check of it, as many in all processes
        self._entries: Entries = {}  # of these, what holds several entries of a row
        self._buffers: BufferCheck | None = None  # as they were before it
        self._aside = contextlib.ExitStack()  # what the forward outside of it is not to change
        self._whole: dict[str, nn.Parameter] = {}
        self._label_check: LabelCheck | None = None
        self._reentrant: ReentrantCheck | None = None
        self._check_reentrant = True
        self._layouts = KnownLayouts()
        # For graphs that torch.compile makes of the model.
        self.number, self.key = next(compiled.numbers), compiled.new_owner(self)
        self.clock = torch.zeros((), dtype=torch.int64)  # what orders a compiled step
        self.sites: list[Any] = []
        self.one_row = False  # whether the batch under way has one row

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelForward":
        """Itself: a copy of an attached model keeps the hooks, which ignore all but this model."""
        return self

    # In and out of the model

    @property
    def attached(self) -> bool:
        return bool(self._attached)

    def attach(self) -> None:
        """Put the scored layers in place."""
        if self._attached:
            raise GraddotError("the engine is attached already; detach() it first")
        forwards = (module.__dict__.get("forward") for module in self.model.modules())
        if any(isinstance(forward, ScoredForward) for forward in forwards):
            raise GraddotError("another engine is attached to the model; detach() it first")
        for name, _ in self.model.named_modules():
            if name not in self._places:
                raise GraddotError(f"module {name} is new since the engine was made; make it last")
        check_same_model(self.model, self._parameters, [module for module, _ in self._attached])
        for name, module in self.model.named_modules():
            if name in self._rules:
                self._attach_layer(module, name)
        self._hooks = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward, always_call=True),
        ]

    def _attach_layer(self, module: nn.Module, name: str) -> None:
        self._attached.append((module, module.__dict__.get("forward")))
        module.forward = self._scored_forward(module, name, self._rules[name])  # type: ignore[method-assign]

    def _scored_forward(
        self, module: nn.Module, name: str, rule: Callable[..., Any]
    ) -> ScoredForward:
        """The same after each `attach`, so that what was compiled stays valid."""
        scored = self._forwards.get(name)
        if scored is None:
            begin, end = self._begin_layer, self._end_layer
            scored = self._forwards[name] = ScoredForward(module, name, rule, begin, end, self)
            scored.graddot_head = functools.partial(self._begin_head, module, name)  # type: ignore[attr-defined]
        scored.own_forward = module.forward
        if name in self._mixtures:  # no graph can hold it: its tensors' sizes depend on the data
            scored.keeps_tensors = True
        return scored

    def detach(self) -> None:
        """Leave the model exactly as it was before `attach`."""
        for module, forward in self._attached:
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward
        for hook in self._hooks:
            hook.remove()
        self._attached, self._hooks = [], []
        self.give_up()
        rows_of.pop(self.number, None)

    # One micro-batch

    def begin(self, micro: MicroBatch) -> None:
        """The next forward of the model, with a graph, is this micro-batch's."""
        check_same_model(self.model, self._parameters, [module for module, _ in self._attached])
        self.micro, self.logged_unapplied = micro, False
        labels = micro.labels
        rows_of[self.number] = torch.empty(len(labels), dtype=torch.bool)
        self.one_row = len(labels) == 1
        unseen = self._layouts.is_new(self._mode(len(labels), [labels]), labels.shape[1:])
        unchecked = bool(micro.filled) and not self._padding_checked or self._unchecked_row(micro)
        if self.is_first or unseen or unchecked:
            run_uncompiled(self.number)  # the checks of a first step look at the model uncompiled

    def _unchecked_row(self, micro: MicroBatch) -> bool:
        """Whether it is the first packed row of several samples."""
        several = micro.segments is not None and len(micro.segments) > 1
        return several and not self._apart_checked

    @property
    def is_first(self) -> bool:
        """Whether the next step is checked: no forward of a step has ended since that was due."""
        return self._label_check is None

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
        micro.step.dot_held_rows()
        if not micro.step.has_dots:
            raise GraddotError("no backward pass ran since the forward, or none reached the layers")
        micro.loss_scale.check()
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
        self._thorough &= not micro.step.first or micro.step.rows == 1
        self._finished += 1
        if self._finished in CHECKED_AFTER or self._undecided:
            self._label_check = None
        self.micro, self._whole = None, {}
        return micro

    def give_up(self) -> None:
        """Forget the micro-batch under way."""
        run_compiled()
        if self.micro is not None and self.micro.step.first:
            self._label_check = None  # what was not finished was not checked
        self.micro = None
        if self._reentrant is not None:
            self._reentrant.remove()
            self._reentrant = None

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside of it the model runs as it was, outside of any step."""
        kept = self.micro, self.logged_unapplied
        self.micro = None
        try:
            yield
        finally:
            self.micro, self.logged_unapplied = kept

    def tracked(self, loss: Tensor) -> Tensor:
        """The loss, whose later scaling shows in a leaf of the micro-batch under way."""
        if self.micro is None:
            return loss
        if self.micro.step.first and self._whole:
            check_parameter_uses(loss, self._whole)
        return self.micro.loss_scale.tracked(loss)

    # A layer's forward

    def scoring(self) -> bool:
        """Whether a layer that runs now belongs to a step."""
        return self.micro is not None and torch.is_grad_enabled()

    def _begin_layer(self, module: nn.Module, name: str) -> Step | None:
        """The step that a layer's forward belongs to, with the layer's parameters in it."""
        micro = self.micro
        # Without a graph only the first run of a reentrant checkpoint belongs to the step.
        if micro is None or not (micro.running or torch.is_grad_enabled()):
            return None
        self._resolve(micro, module, name)
        return micro.step

    def require_layout(self, step: Step, name: str) -> None:
        """See to it that a layer, which is about to run, knows how its input holds the rows."""
        if self.micro is not None and step.layouts and name not in step.layouts and not step.trial:
            self._find_layout_late(self.micro, name)

    def _find_layout_late(self, micro: MicroBatch, name: str) -> None:
        """Learn how the rows lie in the input of a layer that did not run in the first step."""
        layers = self._mixtures.judged(self._forwards)
        for _ in range(4):  # where chance decides whether it runs
            if self._inputs is None or micro.step.sharded:
                break
            with self.set_aside():
                found = find_layouts(
                    self.model, layers, *self._inputs, micro.step.rows,
                    followed=self._followed(layers), entries=self._entries,
                )  # fmt: skip
            micro.step.layouts.update({**found, **micro.step.layouts})
            if name in found:
                self._layouts.learn(*self._kind(micro, *self._inputs), dict(micro.step.layouts))
                return
        raise GraddotError(
            f"layer {name} ran, which had not when the model was checked, so that it is not known"
            " whether its input keeps samples apart; let it run in the first step, or make another"
            " engine once it does"
        )

    def _resolve(self, micro: MicroBatch, module: nn.Module, name: str) -> None:
        """Give a layer's parameters, as they are in this forward, what goes by their names."""
        step = micro.step
        for part, owned_names in self._places[name]:
            for key, parameter in part._parameters.items():
                owned = owned_names.get(key)
                if parameter is None or id(parameter) in step.names:
                    continue
                if owned is None:  # frozen
                    continue
                known = self._parameters[owned]
                distributed.check_plain(owned, parameter, known)
                step.names[id(parameter)] = owned
                if owned in micro.leaf_of:
                    step.leaf_of[id(parameter)] = micro.leaf_of[owned]
                    if self.directions is not None:
                        step.directions[id(parameter)] = self.directions[id(known)]
        if self.is_first and step.sharded:  # whole ones take the place of shards as layers run
            self._whole.update(distributed.plain_parameters(self.model))

    def _end_layer(self, out: Any) -> None:
        if self._reentrant is not None:
            self._reentrant.watch(tensors_in(out))

    def _begin_head(
        self, module: nn.Module, name: str, labelled: Tensor, mean: bool
    ) -> Step | None:
        """The same for the fused head, which runs in this layer's place and sees which tokens are
        labelled, (rows, T), and whether its loss is their mean."""
        step = self._begin_layer(module, name)
        if step is not None:
            assert self.micro is not None
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
        group = distributed.averaging_group(list(self._parameters.values()), self.process_group)
        n_train = None
        if self.global_mean or (micro.loss_reduction == "sum" and micro.items is None):
            own = counts[: micro.n].sum().to(micro.step.scale.device)
            n_train = distributed.summed(own, group)
        micro.set_counts(counts, distributed.world_size(group), n_train)

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
        if self._probing:
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
        items, labelled = kwargs.get("num_items_in_batch"), kwargs.get("labels") is not None
        if micro.step.first and not micro.forwarded and items is not None and labelled:
            self._see_whether_divided(args, kwargs)
        self._start(micro, items, labelled)
        self._followed_whole = False
        self._find_layouts(micro, args, kwargs)
        self._inputs = args, kwargs
        if micro.step.first and micro.step.val_rows:
            self._buffers = BufferCheck(self.model, held_values(self.model))
        if self._followed_whole:
            # The forward that PyTorch is about to call is the one that was there before: it runs
            # outside of the step, and the new one after it.
            self.micro, self._postponed = None, (micro, *own_inputs((args, kwargs)))
            self._aside.enter_context(own_buffers(self.model))
            self._aside.enter_context(own_random())
            return
        micro.running = True

    def begin_compiled(self, inputs: list[Tensor], items: Any, labelled: bool) -> None:
        """The same from inside a compiled graph."""
        micro = self.micro
        if micro is None:
            raise GraddotError("a compiled model ran outside of the step that it was compiled for")
        shapes = [x.shape[1:] for x in inputs]
        layouts = self._layouts.of(self._mode(micro.step.rows, inputs), shapes)
        if layouts is None:
            raise GraddotError(
                f"no uncompiled step ran with inputs of these shapes, {shapes}, which the check that"
                " samples are kept apart needs; compile the model, torch.compile(model), and no code"
                " around it, or pass attach_train_batch labels of the same shape as those that the"
                " model gets"
            )
        micro.step.layouts.update(layouts)
        if micro.running:  # the forward raised, and is tried again
            micro.step.shared.clear()
        self._start(micro, items, labelled)
        micro.running = True

    def _start(self, micro: MicroBatch, items: Number | None, labelled: bool) -> None:
        if micro.forwarded:
            raise GraddotError("the model ran twice since attach_train_batch; one forward a batch")
        # What a loss of the caller's own is made of; labels that the model gets are for its own.
        if items is not None and (self._divided or not labelled):
            micro.loss_reduction, micro.items = "sum", items
        counts = micro.counts
        if self.loss.label_shift == "auto" and labelled:
            counts = micro.labelled(self.loss, self.loss.shift_by(self.model))
        self._use_counts(micro, counts)

    def _see_whether_divided(self, args: Any, kwargs: dict[str, Any]) -> None:
        """Learn whether the model's loss is divided by num_items_in_batch, from runs of it as it was.
        If no process can tell yet, the next step is checked again."""
        with self.set_aside():
            seen = is_divided(self.model, args, kwargs)
        distributed.unshard(self.model)
        votes = [None, False, True]
        vote = self._largest(votes.index(seen))
        self._undecided = vote == 0
        if not self._undecided:
            self._divided = bool(votes[vote])

    def _mode(self, rows: int, inputs: list[Tensor]) -> tuple[Any, ...]:
        """Layouts are learnt for each: in a batch of one row little can be told apart, and where an
        input has as many tokens as the batch has rows, or a multiple of it, one may be taken for
        the other. (Not of a sharded model, whose processes have to run it equally often.)"""
        if rows == 1 or distributed.is_sharded(self._parameters.values()):
            return self.model.training, rows == 1
        alike = [[(s > 0 and s % rows == 0) + (s == rows) for s in x.shape[1:]] for x in inputs]
        if not any(map(any, alike)):
            return self.model.training, False
        return self.model.training, False, rows, str(alike)

    def _kind(self, micro: MicroBatch, args: Any, kwargs: Any) -> tuple[Any, list[torch.Size]]:
        """Under which layouts are learnt: the mode, and the inputs' shapes."""
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        # What is found for rows of equally many patches does not hold for others.
        each = [
            torch.Size({*counts} if len({*counts}) == 1 else ())
            for counts in self._entries.values()
        ]
        return self._mode(micro.step.rows, inputs), [*(x.shape[1:] for x in inputs), *each]

    def _find_layouts(self, micro: MicroBatch, args: Any, kwargs: Any) -> None:
        """Learn how each layer's input holds the rows, from runs of the model as it was."""
        self._entries = entries_of(kwargs, micro.step.rows)
        mode, shapes = self._kind(micro, args, kwargs)
        if micro.filled and (micro.step.first or not self._padding_checked):
            for filled in micro.filled if not micro.step.sharded else []:
                with self.set_aside():
                    check_padding(self.model, args, kwargs, micro.step.rows, filled, self._entries)
            self._padding_checked = True
        if micro.step.sharded:
            known = self._known_to_all(micro, shapes)
        else:
            known = None if micro.step.first else self._layouts.of(mode, shapes)
            if known is None and not micro.step.first and micro.segments is not None:
                known = self._layouts.of_tokens(mode, micro.segments.tokens)
        if known is not None:
            micro.step.layouts.update(known)
            return
        problem: GraddotError | None = None
        while True:
            layouts = self._find_layouts_of_mixtures(micro, args, kwargs)
            micro.step.layouts.update(layouts)
            foreign: set[str] = set()
            failed = False
            try:
                self._check_outputs(micro, args, kwargs, foreign)
            except GraddotError as error:
                problem, failed = problem or error, True
                same = {name for name, layout in layouts.items() if layout == "same"}
                if not self._follow_callers(foreign or same | micro.step.expands):
                    raise problem from error
            if not self._agreed(failed):
                break
        self._layouts.learn(mode, shapes, layouts)
        if micro.segments is not None:
            self._layouts.learn_of_tokens(mode, micro.segments.tokens, layouts)
        distributed.unshard(self.model)

    def _find_layouts_of_mixtures(
        self, micro: MicroBatch, args: Any, kwargs: Any
    ) -> dict[str, Layout]:
        """`find_layouts`, where layers that get tokens picked out of the batch are experts."""
        mixed: MixedSamples | None = None
        while True:
            layers = self._mixtures.judged(self._forwards)
            try:
                with self.set_aside():
                    layouts = find_layouts(
                        self.model, layers, args, kwargs, micro.step.rows,
                        functools.partial(self._resolve, micro), self._followed(layers),
                        self._entries, thorough=self._thorough, runs=self._runs,
                        agreed=self._agreed,
                    )  # fmt: skip
                break
            except MixedSamples as error:
                mixed = mixed or error
                if micro.step.sharded:
                    raise
                if (reason := self._mixtures.take(error.layers, self._rules)) is not None:
                    raise GraddotError(f"{mixed}{reason}") from error
        self._attach_mixtures()
        judged = self._mixtures.judged(self._forwards)
        return layouts | {name: ROUTED for name in self._forwards if name not in judged}

    def _agreed(self, x: bool) -> bool:
        """Whether it is so: of a sharded model, in any of its processes, all of which then run the
        model once more."""
        sharded = distributed.is_sharded(self._parameters.values())
        return bool(self._largest(int(x))) if sharded else x

    def _largest(self, number: int) -> int:
        """Of the processes over which gradients are averaged."""
        parameters = list(self._parameters.values())
        group = distributed.averaging_group(parameters, self.process_group)
        return distributed.largest(number, group, distributed.own_part(parameters[0]).device)

    def _known_to_all(
        self, micro: MicroBatch, shapes: list[torch.Size]
    ) -> dict[str, Layout] | None:
        """The layouts of a sharded model's step; None where all processes are to find them, for they
        have to run the model equally often. That takes fewer runs in a batch of one row, and may take
        more where there are as many tokens as rows.

        Layouts that are for all inputs of several rows are so in all processes; of others they have
        to ask each other in every step."""
        step, one_row = micro.step, micro.step.rows == 1
        many, one = ((self.model.training, alone) for alone in (False, True))
        known = self._layouts.of(many, shapes)
        if one_row and known is not None:  # what holds for several rows holds for one
            self._layouts.learn(one, shapes, known)
        elif one_row:
            known = self._layouts.of(one, shapes)
        if not step.first and self._layouts.are_for_all(many):
            return known
        group = distributed.averaging_group(list(self._parameters.values()), self.process_group)
        square = any(step.rows in shape for shape in shapes)
        votes = torch.tensor([1, one_row, square, known is None], device=step.scale.device)
        processes, of_one, of_square, unknown = distributed.summed(votes, group).tolist()
        if not (step.first or unknown):
            return known
        if {of_one, of_square} <= {0, processes}:
            splits = splits_of(step.rows, self._thorough or bool(self._entries))
            self._runs = self._largest(2 * len(splits))
            return None
        if unknown:
            raise GraddotError(
                f"the model is sharded, and {of_one} of {processes} processes have a batch of one row,"
                f" {of_square} one of as many tokens as rows, the others not, so that they cannot run it"
                " equally often to see whether samples are kept apart; begin with at least two rows in"
                " every process, or one in each, and with more tokens than rows"
            )
        step.first = False  # checked before, and again at the next occasion
        return known

    def _follow_callers(self, layers: Iterable[str]) -> bool:
        """Follow what these layers return, the same for every row, through the modules around them,
        one more each time this is called. False if there is none left."""
        new = set()
        for name in layers:
            while name and (name in self._rules or not has_forward(self.model.get_submodule(name))):
                name = name.rpartition(".")[0]
            if name not in self._rules:
                new.add(name)
        for name in new:
            self._rules[name] = caller_rule()
            self._attach_layer(self.model.get_submodule(name), name)
        self._followed_whole |= "" in new
        return bool(new)

    def _followed(self, names: Iterable[str]) -> list[str]:
        """Those of the layers that have a general rule."""
        general = (ProvenRule, functools.partial)
        followed = [name for name in names if isinstance(self._rules.get(name), general)]
        return [name for name in followed if name not in self._mixtures]

    def _attach_mixtures(self) -> None:
        for name, inner in list(self._mixtures.without_rule(self._rules)):
            self._rules[name] = mixture_rule(inner)
            self._attach_layer(self.model.get_submodule(name), name)

    def _check_outputs(self, micro: MicroBatch, args: Any, kwargs: Any, foreign: set[str]) -> None:
        """Run the model once as it was and once with its layers scored, in a step of no account.
        Into foreign come the layers whose parameters others use."""
        step = dataclasses.replace(micro.step, trial=True, shared={}, _dots={}, _rows={}, _held=0)
        trial = dataclasses.replace(micro, step=step, running=True)

        def plain() -> Any:
            own_args, own_kwargs = own_inputs((args, kwargs))
            with self.set_aside(), own_buffers(self.model):
                return self.model(*own_args, **own_kwargs)

        def scored(moved: Any = None) -> Any:
            self.micro, self._probing, step.moved = trial, True, moved
            try:
                # With gradients, which layers that are followed heed, and whose graph shows what is
                # used where; but nothing is kept for them, and activation checkpointing around does
                # not see them.
                nothing = saved_tensors_hooks(lambda x: None, lambda x: x)
                own_args, own_kwargs = own_inputs((args, kwargs))
                with torch.enable_grad(), nothing, own_buffers(self.model):
                    out = self.model(*own_args, **own_kwargs)
                if moved is None and not step.sharded:
                    uses = foreign_uses(out, self._parameters)
                    foreign.update(name.rpartition(".")[0] for name in uses)
                    check_parameter_uses(out, self._parameters)
                return out
            finally:
                self.micro, self._probing = micro, False

        check_outputs(plain, scored, step, self._agreed)

    def _check_numbers(self, micro: MicroBatch, output: Any) -> None:
        """Losses that the model returns must be those of its rows."""
        assert self._inputs is not None
        args, kwargs = self._inputs
        samples = micro.step.rows
        take = lambda x, index: take_inputs(x, index, samples, self._entries)
        if micro.segments is not None:
            samples, take = len(micro.segments), micro.segments.take
            self.check_packed(args, kwargs, micro.segments)
        fused = hasattr(self.model.__dict__.get("forward"), "label_shift")  # checks itself
        outputs = enumerate(tensors_in(output))
        numbers = [k for k, x in outputs if x.dim() == 0 and x.requires_grad]
        if numbers and (not fused or micro.segments is not None):
            weights = micro.counts if micro.loss_reduction == "mean" else None
            with self.set_aside():
                check_loss(
                    self.model, args, kwargs, samples, weights, numbers, take,
                    thorough=self._thorough, runs=self._runs,
                )  # fmt: skip
        self._apart_checked |= micro.segments is not None and samples > 1

    def check_packed(self, args: Any, kwargs: Any, segments: Segments) -> None:
        """Raise GraddotError unless the model keeps apart the samples that share a row."""
        if distributed.is_sharded(self._parameters.values()):
            raise GraddotError(
                "the model is sharded, and would have to be run once for each sample of a packed row,"
                " of which processes have other numbers, to see whether they are kept apart; give"
                " every sample a row of its own"
            )
        layers = {name: self.model.get_submodule(name) for name in self._forwards}
        with self.set_aside():
            check_apart(self.model, layers, args, kwargs, segments)

    def end_compiled(self) -> None:
        """The end of a forward inside a compiled graph."""
        assert self.micro is not None
        self.micro.running, self.micro.forwarded = False, True

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
        self.micro.running = self._probing = True
        try:
            return self.model(*args, **kwargs)
        finally:
            self._probing = False

    def _end(self, output: Any) -> Any:
        if self._suspended is not None:
            self.micro, self._suspended = self._suspended, None
            return output
        if self._postponed is not None and not self._probing:
            output = self._run_postponed()
        micro = self.micro
        if micro is None or not micro.running or self._probing:
            return output
        micro.running = False
        if output is None:  # the forward raised, and may be tried again
            run_compiled()
            micro.step.shared.clear()
            self._inputs = self._buffers = None
            return None
        micro.forwarded, first = True, self.is_first
        if first:
            if self._buffers is not None:
                assert self._inputs is not None
                self._buffers.compare(self.model)
                with self.set_aside():
                    check_memory(self.model, *self._inputs, self._buffers.held, self._agreed)
                self._buffers = None
            whole = {n: self._whole.get(n, p) for n, p in self._parameters.items()}
            check_parameter_uses(output, whole)
            self._whole = whole
        if first and micro.step.first or self._unchecked_row(micro):
            self._check_numbers(micro, output)
        if first and micro.step.rows > 1 and not micro.step.sharded:
            assert self._inputs is not None
            layers = self._mixtures.judged(self._forwards)
            with self.set_aside():
                check_backward(
                    self.model, layers, micro.step.layouts, *self._inputs, micro.step.rows,
                    self._entries,
                )  # fmt: skip
        if first:
            self._label_check = LabelCheck(
                output, micro.labels, micro.counts, micro.summed, self._finished == 0
            )
        if self._check_reentrant and has_reentrant_checkpoint(tensors_in(output)):
            if self.directions is not None:
                distributed.check_static_graph()
            self._reentrant = ReentrantCheck(self._parameters, ScoredFunction)
            self._reentrant.watch(tensors_in(output))
        self._check_reentrant = self._reentrant is not None
        self._inputs = None
        return micro.loss_scale.tracked_output(output, checked=micro.step.first)
