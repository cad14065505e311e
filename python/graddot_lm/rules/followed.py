"""The tensors of a layer's forward that are followed, and what each is for every row."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from ..errors import GraddotError
from ..scored import Scored
from .row_calls import is_custom, over_rows, too_large
from .row_gradients import one_at_a_time


class Followed:
    """What is followed in one forward, the layer's own parameters first; and what has no rows.

    By id; the tensors are held, so that no id is taken again.
    """

    def __init__(self, module: nn.Module, scored: Scored, arguments: Any, largest: float) -> None:
        """largest: elements of the copies of one row that a call may hold, where it has less."""
        self.scored, self._module, self._largest = scored, module, largest
        self.own = {id(p): p for p in module.parameters() if p.requires_grad}
        self.forms: dict[int, tuple[Tensor, bool]] = {}  # casts of one's own, or transposed
        self._copies: dict[int, tuple[Tensor, Callable[[], Tensor]]] = {}
        self.expanded: set[int] = set()  # those with the rows in their first dimension
        self.made: dict[int, Tensor] = {}  # of constants alone, but with the rows there
        # What a mask picked out of the rows, or was made of that, and the mask.
        self._picked: dict[int, tuple[Tensor, Tensor]] = {}
        for p in self.own.values():
            self.follow(p, lambda p=p: scored.per_sample(p))  # type: ignore[misc]
        # Known ones, because a constant may happen to be as long as the batch.
        given = [x for x in tree_leaves(arguments) if isinstance(x, nn.Module)]
        constants = [x for m in (module, *given) for x in (*m.parameters(), *m.buffers())]
        constants += [x for part in module.modules() for x in tensors_among(vars(part).values())]
        constants += [x for p in constants for x in _of_quantized(p)]
        constants += [x for x in tree_leaves(arguments) if is_tensor(x) and not scored.has_rows(x)]
        self.constants = {id(x): x for x in constants if id(x) not in self.own}

    def __contains__(self, x: Any) -> bool:
        return id(x) in self._copies

    def tensors(self) -> list[Tensor]:
        return [x for x, _ in self._copies.values()]

    def maker(self, x: Tensor) -> Callable[[], Tensor]:
        """What makes the copies of a tensor that is followed."""
        return self._copies[id(x)][1]

    def is_own(self, x: Any) -> bool:
        return id(x) in self.own

    def is_constant(self, x: Any) -> bool:
        return id(x) in self.constants

    def clear(self) -> None:
        """Let go of all, whose copies know of this object: a cycle that would keep them, and their
        graph, until Python looks for such."""
        for known in (self._copies, self.forms, self.made, self.constants, self._picked):
            known.clear()

    def as_rows(self, values: Any, *, one_for_all: bool = False) -> Any:
        """What is followed and was expanded to the rows, with entry i from copy i; with
        one_for_all also what may be, (1, ...)."""

        def one(x: Tensor) -> Tensor:
            if id(x) in self.expanded:
                return self.by_row(x)
            single = one_for_all and x in self and x.shape[:1] == (1,)
            return self.copies(x).squeeze(1) if single else x

        return tree_map_only(Tensor, one, values)

    def is_one_for_all(self, x: Tensor) -> bool:
        """Whether it is a constant, or followed and not expanded to the rows."""
        return self.is_constant(x) or (x in self and id(x) not in self.expanded)

    def follow(self, x: Tensor, copies: Callable[[], Tensor]) -> None:
        """copies() is x once for every row, (rows, *x.shape); it is called once at most."""
        made: list[Tensor] = []

        def once() -> Tensor:
            if not made:
                made.append(copies())
            return made[0]

        self._copies[id(x)] = x, once

    def copies(self, x: Tensor) -> Tensor:
        """(rows, *x.shape) of what is followed, or a constant."""
        if x not in self:
            return x.expand(self.scored.rows, *x.shape)
        return self.maker(x)()

    def by_row(self, x: Tensor) -> Tensor:
        """What was expanded to the rows, with entry i from copy i."""
        rows = self.scored.rows
        entries = self.copies(x).unflatten(1, (rows, -1)).diagonal(dim1=0, dim2=1)
        return entries.movedim(-1, 0).flatten(0, 1)

    def note_picked(self, func: Any, args: Any, tensors: list[Tensor], out: Any) -> None:
        """Remember what a call that may have picked entries of the rows by a mask returned."""
        if func is Tensor.__getitem__ and is_mask(args[1]):
            mask = args[1]
        else:
            masks = [(len(x), self._picked[id(x)][1]) for x in tensors if id(x) in self._picked]
            if not masks:
                return
            entries, mask = masks[0]
            if not all(x.shape[:1] == (entries,) for x in tensors_among((out,))):
                return
        if len(mask) % self.scored.rows == 0:
            self._picked |= {id(x): (x, mask) for x in tensors_among((out,))}

    def entries_of_rows(self, x: Tensor) -> list[int] | None:
        """How many of the first dimension's entries each row has; None if it does not hold rows."""
        rows = self.scored.rows
        if id(x) in self._picked:
            counts: list[int] = self._picked[id(x)][1].reshape(rows, -1).sum(1).tolist()
            return counts
        return None if x.dim() == 0 or x.shape[0] % rows else [x.shape[0] // rows] * rows

    def mapped(self, func: Any, args: Any, kwargs: Any, variable: list[Tensor]) -> Any:
        """A call with tensors that have rows, row by row, with copy i of what is followed for row i; or,
        of a function of one's own, with a whole weight."""
        rows = self.scored.rows
        largest = max(self._largest, max(x.numel() for x in variable) // rows)
        leaves, spec = tree_flatten((args, kwargs))
        parts = {id(x): self._parts(func, x) for x in variable}
        uneven = any(isinstance(x, tuple) for x in parts.values())
        whole = self._whole(func, leaves, 0 if uneven else largest)
        if uneven and whole is None:
            raise GraddotError(
                f"{func.__name__} of its parameters and of what a mask picks out of the rows, which are"
                " more entries in some than in others"
            )
        at, mapped = [], []
        for i, x in enumerate(leaves):
            if id(x) in parts:
                at.append(i)
                mapped.append(parts[id(x)])
            elif x in self and x is not whole:
                at.append(i)
                expanded = id(x) in self.expanded
                if x.numel() > largest and not expanded:
                    raise too_large(self._module, x.numel())
                mapped.append(
                    self.by_row(x).unflatten(0, (rows, -1)) if expanded else self.copies(x)
                )

        def one(*values: Tensor, parameter: Tensor | None = whole) -> Any:
            filled = [parameter if x is whole else x for x in leaves]
            for i, x in zip(at, values, strict=True):
                filled[i] = x
            inner_args, inner_kwargs = tree_unflatten(filled, spec)
            return func(*inner_args, **inner_kwargs)

        if whole is not None:
            out = one_at_a_time(one, whole, self.scored.step, [*zip(*mapped, strict=True)])
            self.note_picked(func, args, variable, out)
            return out
        kind = variable[0].device.type
        in_place = getattr(func, "__name__", "").startswith("__i") or func.__name__[-1] == "_"
        if torch.is_autocast_enabled(kind) and not in_place:  # see row_by_row
            dtype = functools.reduce(torch.promote_types, (x.dtype for x in mapped))
            mapped = [x.to(dtype) if x.is_floating_point() else x for x in mapped]
        with torch.autocast(kind, enabled=False):
            out = over_rows(one, *mapped, loop=is_custom(func))
        return tree_map_only(Tensor, lambda x: x.flatten(0, 1), out)

    def _whole(self, func: Any, leaves: list[Any], largest: float) -> Tensor | None:
        """The layer's own weight that a function of one's own takes, and that has no copies: it is too
        large for them, or an embedding's, too."""
        for x in leaves if is_custom(func) else []:
            if self.is_own(x) and x.dim() == 2:
                tied = self.scored.step.uses(x).embedding_ids
                if x.numel() > largest or tied:
                    return x  # type: ignore[no-any-return]
        return None

    def _parts(self, func: Any, x: Tensor) -> Any:
        """Every row's entries of a tensor that has rows, by themselves: one tensor, (rows, ...), or a tuple
        where some rows have more entries than others."""
        rows, entries = self.scored.rows, self.entries_of_rows(x)
        if entries is None:
            raise GraddotError(
                f"{func.__name__} of its parameters and of a tensor of shape {tuple(x.shape)},"
                f" whose first dimension does not hold {rows} rows"
            )
        return x.unflatten(0, (rows, entries[0])) if len({*entries}) == 1 else x.split(entries)

    def form(self, x: Tensor) -> tuple[Tensor | None, bool]:
        """The layer's own parameter that x is, or is a cast of, and whether it is transposed."""
        return self.forms.get(id(x), (self.own.get(id(x)), False))

    def is_computed(self, x: Tensor | None) -> bool:
        return x in self and not self.is_own(x)


def _of_quantized(parameter: Tensor) -> Iterator[Tensor]:
    """What a quantized weight keeps to be made whole again, as scales: in attributes of the weight, or of
    objects there, as bitsandbytes' QuantState and the one inside of it."""
    within = [vars(parameter)] if hasattr(parameter, "__dict__") else []
    for values in within:
        yield from tensors_among(values.values())
        within += [vars(x) for x in values.values() if type(x).__name__ == "QuantState"]


def is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def is_mask(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.bool and x.dim() > 0


def tensors_among(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, and in lists, tuples and dicts among them."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from tensors_among(x)
        elif isinstance(x, dict):
            yield from tensors_among(x.values())
