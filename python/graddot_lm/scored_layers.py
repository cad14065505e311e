"""The layers of a model that have a rule, and their scored forwards, which stand in the place of
their own while an engine is attached."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from .checks.rows import Layout, MixedSamples
from .checks.verify import check_same_model
from .errors import GraddotError
from .rules.found_mixtures import FoundMixtures, has_forward
from .rules.general import ProvenRule, caller_rule
from .rules.mixtures import ROUTED, mixture_rule
from .rules.table import rule_for
from .scored import ScoredForward


class ScoredLayers:
    """parameters are the covered and the excluded ones by name; new_forward(module, name, rule) makes
    a layer's scored forward."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        new_forward: Callable[[nn.Module, str, Callable[..., Any]], ScoredForward],
    ) -> None:
        self._model, self.parameters, self._new_forward = model, parameters, new_forward
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
        self._left: set[str] = set()  # those whose rule was taken away
        self._mixtures = FoundMixtures(model)
        self._forwards: dict[str, ScoredForward] = {}
        self._attached: list[tuple[nn.Module, Any]] = []

    @property
    def attached(self) -> bool:
        return bool(self._attached)

    @property
    def forwards(self) -> Mapping[str, ScoredForward]:
        """Those in place, by layer."""
        return self._forwards

    @property
    def include_model(self) -> bool:
        """Whether the model itself is one of them."""
        return "" in self._rules

    def check_same(self) -> None:
        """Raise GraddotError if the model has other parameters than before, or lost one of these."""
        check_same_model(self._model, self.parameters, [module for module, _ in self._attached])

    def attach(self) -> None:
        """Put the scored forwards in place."""
        if self._attached:
            raise GraddotError("the engine is attached already; detach() it first")
        forwards = (module.__dict__.get("forward") for module in self._model.modules())
        if any(isinstance(forward, ScoredForward) for forward in forwards):
            raise GraddotError("another engine is attached to the model; detach() it first")
        for name, _ in self._model.named_modules():
            if name not in self._places:
                raise GraddotError(f"module {name} is new since the engine was made; make it last")
        self.check_same()
        for name, _ in self._model.named_modules():
            if name in self._rules:
                self._attach(name)

    def _attach(self, name: str) -> None:
        """A layer keeps its scored forward, so that what was compiled stays valid."""
        module = self._model.get_submodule(name)
        if name not in self._forwards:
            self._forwards[name] = self._new_forward(module, name, self._rules[name])
        scored = self._forwards[name]
        scored.own_forward = module.forward
        if name in self._mixtures:  # no graph can hold it: its tensors' sizes depend on the data
            scored.keeps_tensors = True
        self._attached.append((module, module.__dict__.get("forward")))
        module.forward = scored  # type: ignore[method-assign]

    def detach(self) -> None:
        """Leave the model exactly as it was before `attach`."""
        _restore(self._attached)
        self._attached = []

    def parameters_in(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that a layer holds now, by their names in the model; no frozen ones."""
        for part, names in self._places[name]:
            for key, parameter in part._parameters.items():
                named = names.get(key)
                if parameter is not None and named is not None:
                    yield named, parameter

    # As the checks run the model

    def modules(self) -> dict[str, nn.Module]:
        return {name: self._model.get_submodule(name) for name in self._forwards}

    def judged(self) -> dict[str, nn.Module]:
        """Those whose input has to hold the rows in one of the ways; of an expert's only it is known
        that it does not."""
        return self._mixtures.judged(self._forwards)

    def followed(self) -> list[str]:
        """Those of the judged ones that have a general rule."""
        general = (ProvenRule, functools.partial)
        followed = [name for name in self.judged() if isinstance(self._rules.get(name), general)]
        return [name for name in followed if name not in self._mixtures]

    def routed(self) -> dict[str, Layout]:
        """The layout of all others."""
        judged = self.judged()
        return {name: ROUTED for name in self._forwards if name not in judged}

    # Layers that get a rule because of what a check found

    def follow_callers(self, layers: Iterable[str]) -> bool:
        """Follow what these layers return, the same for every row, through the modules around them,
        one more each time this is called. False if there is none left."""
        new = set()
        for name in layers:
            while name and (
                name in self._rules
                or name in self._left
                or not has_forward(self._model.get_submodule(name))
            ):
                name = name.rpartition(".")[0]
            if name not in self._rules:
                new.add(name)
        for name in new:
            self._rules[name] = caller_rule()
            self._attach(name)
        return bool(new)

    def leave_to_callers(self, name: str) -> bool:
        """Take its rule from a layer that returns what has no rows: it runs as it is, inside of one that
        is followed, as its own part. False if there is none."""
        if name not in self._rules or not name:
            return False
        self._left.add(name)
        module, around = self._model.get_submodule(name), name.rpartition(".")[0]
        del self._rules[name], self._forwards[name]
        left = [place for place in self._attached if place[0] is module]
        self._attached = [place for place in self._attached if place[0] is not module]
        _restore(left)
        while around in self._left or (
            around and not has_forward(self._model.get_submodule(around))
        ):
            around = around.rpartition(".")[0]
        followed = getattr(self._rules.get(around), "follows", False)
        return followed or self.follow_callers([around])

    def take_for_experts(self, error: MixedSamples) -> str | None:
        """Take the layers of which it is not known how their inputs hold the rows for experts, or parts
        of them. Otherwise what to say of it."""
        return self._mixtures.take(error.layers, self._rules)

    def attach_mixtures(self) -> None:
        """Put those in place that were found since."""
        for name, inner, found_by in list(self._mixtures.without_rule(self._rules)):
            self._rules[name] = mixture_rule(inner, found_by)
            self._attach(name)


def _restore(places: list[tuple[nn.Module, Any]]) -> None:
    """Put modules' forwards back as they were before they were scored."""
    for module, forward in places:
        del module.__dict__["forward"]
        if forward is not None:
            module.__dict__["forward"] = forward
