"""How the rows lie in the inputs of a model's layers: learnt in a first step, and again for inputs of
another kind, and remembered in between."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .. import distributed
from ..averaging import Averaging
from ..errors import GraddotError
from ..rules.general import NoRows
from ..scored_layers import ScoredLayers
from ..scores import MicroBatch
from ..step import Step, refuse_backward
from .digests import numbers_of, own_buffers, own_inputs
from .outputs import check_outputs
from .parts import ModelInputs, splits_of
from .rows import KnownLayouts, Layout, MixedSamples, find_layouts
from .verify import check_parameter_uses, foreign_uses

# Puts what goes by a layer's parameters into a step, or refuses the layer.
Resolve = Callable[[MicroBatch, nn.Module, str], None]


class LayoutSearch:
    """in_step(micro) is a context in which the model's layers belong to a micro-batch; all else is to be
    called outside of any."""

    def __init__(
        self,
        model: nn.Module,
        layers: ScoredLayers,
        averaging: Averaging,
        resolve: Resolve,
        in_step: Callable[[MicroBatch], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._model, self._layers, self._averaging = model, layers, averaging
        self._resolve, self._in_step = resolve, in_step
        self._known = KnownLayouts()

    # What is known

    def is_new(self, rows: int, x: Tensor) -> bool:
        """Whether such labels, or such an input, may come in a batch of unknown layouts."""
        return self._known.is_new(self._mode(rows, [x]), x.shape[1:])

    def of(self, rows: int, inputs: list[Tensor]) -> dict[str, Layout] | None:
        return self._known.of(self._mode(rows, inputs), [x.shape[1:] for x in inputs])

    def _mode(self, rows: int, inputs: list[Tensor]) -> tuple[Any, ...]:
        """Layouts are learnt for each: in a batch of one row little can be told apart, and where an
        input has as many tokens as the batch has rows, or a multiple of it, one may be taken for
        the other. (Not of a sharded model, whose processes have to run it equally often.)"""
        if rows == 1 or self._averaging.sharded:
            return self._model.training, rows == 1
        alike = [[(s > 0 and s % rows == 0) + (s == rows) for s in x.shape[1:]] for x in inputs]
        if not any(map(any, alike)):
            return self._model.training, False
        return self._model.training, False, rows, str(alike)

    def _kind(self, inputs: ModelInputs) -> tuple[Any, list[torch.Size]]:
        """Under which layouts are learnt: the mode, and the inputs' shapes."""
        # What is found for rows of equally many patches does not hold for others.
        each = [
            torch.Size({*counts} if len({*counts}) == 1 else ())
            for counts in inputs.entries.values()
        ]
        shapes = [*(x.shape[1:] for x in inputs.tensors), *each]
        return self._mode(inputs.rows, inputs.tensors), shapes

    def _known_to_all(
        self, micro: MicroBatch, inputs: ModelInputs, shapes: list[torch.Size]
    ) -> dict[str, Layout] | None:
        """The layouts of a sharded model's step; None where all processes are to find them, for they
        have to run the model equally often. That takes fewer runs in a batch of one row, and may take
        more where there are as many tokens as rows.

        Layouts that are for all inputs of several rows are so in all processes; of others they have
        to ask each other in every step."""
        step, one_row = micro.step, micro.step.rows == 1
        many, one = ((self._model.training, alone) for alone in (False, True))
        known = self._known.of(many, shapes)
        if one_row and known is not None:  # what holds for several rows holds for one
            self._known.learn(one, shapes, known)
        elif one_row:
            known = self._known.of(one, shapes)
        if not step.first and self._known.are_for_all(many):
            return known
        square = any(step.rows in shape for shape in shapes)
        votes = torch.tensor([1, one_row, square, known is None], device=step.scale.device)
        processes, of_one, of_square, unknown = self._averaging.summed(votes).tolist()
        if not (step.first or unknown):
            return known
        if {of_one, of_square} <= {0, processes}:
            splits = splits_of(step.rows, inputs.thorough or bool(inputs.entries))
            inputs.runs = self._averaging.largest(2 * len(splits))
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

    # Learning it

    def learn(self, micro: MicroBatch, inputs: ModelInputs) -> None:
        """Put into the step how each layer's input holds the rows; where that is not known, from runs
        of the model as it was."""
        mode, shapes = self._kind(inputs)
        if micro.step.sharded:
            known = self._known_to_all(micro, inputs, shapes)
        else:
            known = None if micro.step.first else self._known.of(mode, shapes)
            if known is None and not micro.step.first and micro.segments is not None:
                known = self._known.of_tokens(mode, micro.segments.tokens)
        if known is not None:
            micro.step.layouts.update(known)
            return
        problem: GraddotError | None = None
        while True:
            layouts = self._find(micro, inputs)
            micro.step.layouts.update(layouts)
            foreign: set[str] = set()
            failed = False
            try:
                self._check_outputs(micro, inputs, foreign)
            except GraddotError as error:
                problem, failed = problem or error, True
                same = {name for name, layout in layouts.items() if layout == "same"}
                same |= micro.step.expands
                without = {error.layer} - same if isinstance(error, NoRows) else set()
                left = any(map(self._layers.leave_to_callers, without))
                if not (left or self._layers.follow_callers(foreign or same)):
                    if error is problem:
                        raise
                    raise GraddotError(
                        f"{problem}\nFollowed through the modules around: {error}"
                    ) from error
            if not self._averaging.agreed(failed):
                break
        self._known.learn(mode, shapes, layouts)
        if micro.segments is not None:
            self._known.learn_of_tokens(mode, micro.segments.tokens, layouts)
        distributed.unshard(self._model)

    def _find(self, micro: MicroBatch, inputs: ModelInputs) -> dict[str, Layout]:
        """`find_layouts`, where layers that get tokens picked out of the batch are experts."""
        resolve = functools.partial(self._resolve, micro)
        mixed: MixedSamples | None = None

        def note(part: Sequence[int], out: Any) -> None:
            inputs.numbers[tuple(part)] = numbers_of(self._model, out)

        while True:
            try:
                layouts = find_layouts(
                    self._model, self._layers.judged(), *inputs.both, inputs.rows, resolve,
                    self._layers.followed(), inputs.entries, thorough=inputs.thorough,
                    runs=inputs.runs, agreed=self._averaging.agreed, on_output=note,
                )  # fmt: skip
                break
            except MixedSamples as error:
                mixed = mixed or error
                if micro.step.sharded:
                    raise
                if error.beside and self._layers.follow_callers(error.layers):
                    continue
                if (reason := self._layers.take_for_experts(error)) is not None:
                    raise GraddotError(f"{mixed}{reason}") from error
        self._layers.attach_mixtures()
        return layouts | self._layers.routed()

    def learn_late(self, step: Step, inputs: ModelInputs | None, name: str) -> None:
        """The same of a layer that did not run in the first step, and is about to. Raises GraddotError
        if it cannot be seen."""
        for _ in range(4):  # where chance decides whether it runs
            if inputs is None or step.sharded:
                break
            found = find_layouts(
                self._model, self._layers.judged(), *inputs.both, inputs.rows,
                followed=self._layers.followed(), entries=inputs.entries,
            )  # fmt: skip
            step.layouts.update({**found, **step.layouts})
            if name in found:
                self._known.learn(*self._kind(inputs), dict(step.layouts))
                return
        raise GraddotError(
            f"layer {name} ran, which had not when the model was checked, so that it is not known"
            " whether its input keeps samples apart; let it run in the first step, or make another"
            " engine once it does"
        )

    def _check_outputs(self, micro: MicroBatch, inputs: ModelInputs, foreign: set[str]) -> None:
        """Run the model once as it was and once with its layers scored. Into foreign come the layers
        whose parameters others use."""
        step = dataclasses.replace(
            micro.step, trial=True, running=True, shared={}, _dots={}, _rows={}, _held=0
        )
        trial = dataclasses.replace(micro, step=step)

        def plain(both: Any = inputs.both) -> Any:
            own_args, own_kwargs = own_inputs(both)
            with own_buffers(self._model):
                return self._model(*own_args, **own_kwargs)

        def scored(moved: Any = None) -> Any:
            step.moved = moved
            # With gradients, which layers that are followed heed, and whose graph shows what is used
            # where; but nothing is kept for them, and activation checkpointing around does not see them.
            nothing = saved_tensors_hooks(lambda x: None, refuse_backward)
            with self._in_step(trial), torch.enable_grad(), nothing:
                out = plain()
            if moved is None and not step.sharded:
                named = self._layers.parameters.items()
                judged = {name: p for name, p in named if micro.judged(name)}
                uses = foreign_uses(out, {id(p): name for name, p in judged.items()})
                foreign.update(name.rpartition(".")[0] for name in uses)
                check_parameter_uses(out, judged)
            return out

        # Other processes that share the model would not run it.
        of_half = None
        if not step.sharded:
            of_half = lambda: plain(inputs.take(inputs.both, range(step.rows // 2)))
        check_outputs(plain, scored, step, self._averaging.agreed, of_half)
