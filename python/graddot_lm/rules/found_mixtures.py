"""Where in a model the mixtures are whose experts are layers of their own (mixtures.py): found from what
the check of samples could not tell."""

from collections.abc import Collection, Iterator, Sequence

from torch import nn


class FoundMixtures:
    """By the mixture's name, the names of its experts."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._experts: dict[str, list[str]] = {}
        self._found_by: dict[str, str] = {}  # the first layer of whose input it is not known

    def __contains__(self, name: str) -> bool:
        return name in self._experts

    def judged(self, scored: Collection[str]) -> dict[str, nn.Module]:
        """The layers whose input has to hold the rows in one of the ways: those that are scored but
        for those inside of experts, and what may be a mixture of experts."""
        experts = {name for names in self._experts.values() for name in names}
        return {
            name: module
            for name, module in self._model.named_modules()
            if (name in scored or name in self)
            and not any(around in experts for around in _path(name))
        }

    def take(self, layers: Sequence[str], ruled: Collection[str]) -> str | None:
        """Take these layers, of whose inputs it is not known how they hold the rows, for experts or
        parts of them, in mixtures around the lists in which they are. Otherwise what to say of it.
        ruled are the layers that have a rule."""
        for name in layers:
            self._experts.pop(name, None)  # it is inside of an expert itself
        for name in layers:
            around = _path(name)[1:]
            lists = [k for k, x in enumerate(around) if self._is_list(x)]
            callables = [
                x for x in around[min(lists, default=len(around)) :] if self._can_be_called(x)
            ]
            if not callables or callables[0] in ruled:
                self._experts = {x: of for x, of in self._experts.items() if x in ruled}
                if not callables or callables[0] in self:
                    return ""
                return (
                    f". Layer {callables[0]} has parameters of its own; if it is a mixture of experts, put"
                    " them into a layer inside of it"
                )
            mixture = callables[0]
            if self._is_list(mixture):  # which routes by itself
                parts = _parts_inside(mixture, self._model.get_submodule(mixture))
            else:
                outermost = around[around.index(mixture) - 1]
                parts = _callable_parts(outermost, self._model.get_submodule(outermost))
            self._experts.setdefault(mixture, []).extend(parts)
            self._found_by.setdefault(mixture, name)
        return None

    def without_rule(self, ruled: Collection[str]) -> Iterator[tuple[str, set[str], str]]:
        """The mixtures that have no rule yet, the names of their experts in them, and the layer that they
        were found by."""
        for name, experts in self._experts.items():
            if name not in ruled:
                inside = {expert.removeprefix(f"{name}.") for expert in experts}
                yield name, inside, self._found_by[name]

    def _can_be_called(self, name: str) -> bool:
        return has_forward(self._model.get_submodule(name))

    def _is_list(self, name: str) -> bool:
        lists = (nn.ModuleList, nn.ModuleDict)
        return isinstance(self._model.get_submodule(name), lists) or not self._can_be_called(name)


def has_forward(module: nn.Module) -> bool:
    """Whether a module can be called; a ModuleList cannot."""
    return type(module).forward is not nn.Module.forward


def _path(name: str) -> list[str]:
    """A module's name and those of the modules around it, the model left out."""
    parts = name.split(".") if name else []
    return [".".join(parts[:k]) for k in range(len(parts), 0, -1)]


def _callable_parts(name: str, module: nn.Module) -> Iterator[str]:
    """The outermost modules in a nesting of lists that can be called."""
    if has_forward(module):
        yield name
    else:
        yield from _parts_inside(name, module)


def _parts_inside(name: str, module: nn.Module) -> Iterator[str]:
    for key, part in module.named_children():
        yield from _callable_parts(f"{name}.{key}", part)
