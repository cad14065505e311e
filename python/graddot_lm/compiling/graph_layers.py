"""Which layers a graph of torch.compile may score by itself (in_graph.py), and the dots that it leaves."""

import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraddotError
from ..scored_layers import ScoredLayers
from ..scores import MicroBatch
from .in_graph import GraphInputs, inputs_of


class InGraphLayers:
    """Which layers a graph may score, and their dots.

    parameters are the covered and the excluded ones by name.
    """

    def __init__(self, layers: ScoredLayers, parameters: Mapping[str, nn.Parameter]) -> None:
        self._layers, self._parameters = layers, parameters
        self._judged: dict[str, bool] = {}  # by layer: whether a graph may score it
        self._traced = False
        self._micro: MicroBatch | None = None
        self._directions: Mapping[int, Tensor] | None = None
        self._ran: Counter[str] = Counter()  # backwards of this step, by layer
        self._form: Any = None  # of the sinks that are provided
        self._keys: set[str] = set()  # of inputs_of
        weakref.finalize(self, _forget, self._keys)

    def judge(self, micro: MicroBatch) -> None:
        """Learn from a step that ran uncompiled which layers' parameters are used once."""
        step = micro.step
        for name, scored in self._layers.forwards.items():
            owned = dict(self._layers.parameters_in(name))
            uses = [step.shared.get(id(p)) for p in owned.values()]
            if scored.in_graph is None or not any(uses):
                continue
            trained = len(owned) == len(list(scored.module.parameters()))
            scored_alone = owned.keys() <= micro.leaf_of.keys()
            once = all(one is not None and one.calls == 1 for one in uses)
            self._judged[name] = (
                trained and scored_alone and once and step.layouts.get(name) == "rows"
            )

    def begin(self, micro: MicroBatch, directions: Mapping[int, Tensor] | None) -> None:
        """The next forward is this micro-batch's, with these given directions."""
        self._begin_counting()
        self._micro, self._directions = micro, directions
        if self._traced:
            self._provide()

    def enter(self) -> None:
        if not self._traced:
            self._traced = True
            if self._micro is not None:
                self._provide()

    def _provide(self) -> None:
        """Sinks for all layers that a graph may score, of the step's shape; those of the step before
        where they fit, for to make them takes the host as long as some layers."""
        assert self._micro is not None
        step = self._micro.step
        possible = step.tokens is None and self._micro.segments is None and not step.sharded
        possible &= bool(step.val_rows) or self._directions is not None
        layers = [name for name, fit in self._judged.items() if fit] if possible else []
        directions = self._directions or {}
        given = [(key, id(direction)) for key, direction in directions.items()]
        form = layers, self._micro.dots_shape, step.val_rows, step.norms, step.scale.device, given
        if form == self._form:
            return
        self._form = form
        _forget(self._keys)
        for name in layers:
            owned = [name for name, _ in self._layers.parameters_in(name)]
            own = [directions[id(self._parameters[name])] for name in owned] if directions else []
            sink = torch.empty(
                (len(owned), *self._micro.dots_shape), dtype=torch.float64, device=step.scale.device
            ).requires_grad_()
            key = self._layers.forwards[name].key
            inputs_of[key] = GraphInputs(sink, step.val_rows, step.norms, own)
            self._keys.add(key)

    def scale(self, names: list[str]) -> Tensor:
        """The step's scale, to the backwards of these layers in a graph, which are counted."""
        if self._micro is None:
            raise GraddotError("the backward of a compiled model ran outside of its step")
        self._ran.update(names)
        return self._micro.step.scale

    def collect(self, micro: MicroBatch) -> None:
        """Put the dots that graphs left into the micro-batch's step."""
        dots: dict[str, list[Tensor]] = {}
        for name, times in self._ran.items():
            parameters = dict(self._layers.parameters_in(name))
            elsewhere = any(id(p) in micro.step.shared for p in parameters.values())
            if times > 1 or elsewhere or micro.step.layouts.get(name) != "rows":
                self._judged[name] = False
                raise GraddotError(
                    f"layer {name} ran otherwise in a compiled graph than in the first step, which"
                    " ran uncompiled: more than once, or on another kind of input. The scores of"
                    " this step are lost; from the next one on it is compiled for any use"
                )
            sink = inputs_of[self._layers.forwards[name].key].sink
            if sink.grad is None:
                raise GraddotError(
                    f"the backward ran through the compiled layer {name}, but was told to leave no"
                    " gradient with the engine; call backward() on the loss, without inputs="
                )
            leaves = [micro.leaf_of[owned] for owned in parameters]
            if len(set(leaves)) == 1:  # as where no scores by parameter are wanted
                dots.setdefault(leaves[0], []).append(sink.grad)
                continue
            for leaf, own in zip(leaves, sink.grad.split(1), strict=True):
                dots.setdefault(leaf, []).append(own)
        for leaf, found in dots.items():
            micro.step.add(leaf, torch.cat(found).sum(0))
        self._begin_counting()

    def _begin_counting(self) -> None:
        for name in self._ran:
            if (inputs := inputs_of.get(self._layers.forwards[name].key)) is not None:
                inputs.sink.grad = None
        self._ran.clear()

    def give_up(self) -> None:
        """Forget the micro-batch under way."""
        self._micro = None
        self._begin_counting()

    def forget(self) -> None:
        self._micro = self._directions = self._form = None
        _forget(self._keys)


def _forget(keys: set[str]) -> None:
    for key in keys:
        inputs_of.pop(key, None)
    keys.clear()
