"""Parameters followed through a layer's forward, so that each row uses a copy of its own.

Followed are the layer's own parameters, and those of layers inside that it uses without calling
them. What is computed from them and from constants alone is followed too, and computed once a copy,
by torch.vmap or in a loop, only where it meets a tensor that has rows: that one call is then mapped
over the rows. Where a parameter is the weight of F.linear, F.embedding, F.layer_norm or a matmul, the scored
operation runs instead, which needs no copies.
"""

import contextlib
import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function
from torch.utils._pytree import (
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)

from .errors import GraddotError
from .layers import ScoredFunction
from .scored import Scored, thread

WRITES = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"}
ONLY_THE_TYPE = {"to", "type_as"}  # of a second tensor
CASTS = {*ONLY_THE_TYPE, "type", "float", "double", "half", "bfloat16"}
TRANSPOSES = (Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
# What was decided in a forward, by function and number of its call: for each result whether its
# first dimension is that of the rows; None of a call that met rows.
Decided = tuple[bool, ...] | None
Calls = dict[tuple[str, int], Decided]
TABLES = {func: inspect.signature(func) for func in (F.embedding, F.embedding_bag)}
MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class Refused(GraddotError):
    """Of what a layer does, and no other way of scoring it changes: each row's part of a gradient that
    is scaled by how often an id is in the batch can be proven, but is no part of that."""


class Following(TorchFunctionMode):
    """Active while a layer's own forward runs in a step."""

    def __init__(
        self,
        module: nn.Module,
        scored: Scored,
        arguments: Any,
        largest: float,
        known: Calls,
    ) -> None:
        """largest: elements of the copies of one row that a call may hold, where it has less.
        known: what was decided where this was proven; if nothing, this is that proof, whose number
        of rows divides no other dimension."""
        super().__init__()
        self._module, self._scored, self._largest = module, scored, largest
        self.calls: Calls = {}
        self._known, self._counts, self._last = known, Counter[str](), ("", 0)
        # What calls that the proof does not have made and is as long as the rows; and the calls in
        # which it matters whether it has rows.
        self._unsure: dict[int, Tensor] = {}
        self.doubts: list[str] = []
        self._with_graph = torch.is_grad_enabled()
        # By id; the tensors are held, so that no id is taken again.
        self._own = {id(p): p for p in module.parameters() if p.requires_grad}
        self._forms: dict[int, tuple[Tensor, bool]] = {}  # casts of one's own, or transposed
        self._followed: dict[int, tuple[Tensor, Callable[[], Tensor]]] = {}
        self._expanded: set[int] = set()  # those with the rows in their first dimension
        self._made: dict[int, Tensor] = {}  # of constants alone, but with the rows there
        for p in self._own.values():
            self._follow(p, lambda p=p: scored.per_sample(p))  # type: ignore[misc]
        # Known ones, because a constant may happen to be as long as the batch.
        given = [x for x in tree_leaves(arguments) if isinstance(x, nn.Module)]
        constants = [x for m in (module, *given) for x in (*m.parameters(), *m.buffers())]
        constants += [x for part in module.modules() for x in _tensors(vars(part).values())]
        constants += [x for x in tree_leaves(arguments) if _is_tensor(x) and not scored.has_rows(x)]
        self._constants = {id(x): x for x in constants if id(x) not in self._own}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        before, thread.around = thread.around, self
        try:
            with _functions_seen(), self:
                yield
        finally:
            thread.around = before

    def close(self) -> None:
        """Let go of what was followed, whose copies know of this object: a cycle that would keep them,
        and their graph, until Python looks for such."""
        for known in (self._followed, self._forms, self._made, self._constants, self._unsure):
            known.clear()

    def as_rows(self, values: Any, *, one_for_all: bool = False) -> Any:
        """What is followed and was expanded to the rows, with entry i from copy i; with
        one_for_all also what may be, (1, ...)."""

        def one(x: Tensor) -> Tensor:
            if id(x) in self._expanded:
                return self._by_row(x)
            single = one_for_all and id(x) in self._followed and x.shape[:1] == (1,)
            return self._copies(x).squeeze(1) if single else x

        return tree_map_only(Tensor, one, values)

    def goes_on_inside(self, rule: Any, args: Any, kwargs: Any) -> bool:
        """Whether a layer inside that is called so runs as it is, its parameters followed, instead of by
        its rule: nothing that it gets has rows; or something that is followed has none, which a rule
        does not know, where the layer's own was to follow parameters."""
        tensors = [x for x in tree_leaves((args, kwargs)) if _is_tensor(x)]
        one_for_all = [self._is_one_for_all(x) for x in tensors]
        followed = any(
            id(x) in self._followed for x, one in zip(tensors, one_for_all, strict=True) if one
        )
        return all(one_for_all) or (followed and getattr(rule, "follows", False))

    def _is_one_for_all(self, x: Tensor) -> bool:
        """Whether it is a constant, or followed and not expanded to the rows."""
        return id(x) in self._constants or (id(x) in self._followed and id(x) not in self._expanded)

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if thread.around is not self:  # inside of a layer that is scored by itself
            return func(*args, **kwargs)
        tensors = list(_tensors((*args, *kwargs.values())))
        name = getattr(func, "__name__", "")
        if name in ONLY_THE_TYPE:
            del tensors[1:]
        others = [x for x in tensors if id(x) not in self._followed]
        # One that the forward makes of a constant, as peft transposes weights, has no rows either.
        known = lambda x: id(x) in self._constants or isinstance(x, nn.Parameter)
        variable = [x for x in others if not known(x)]
        if len(others) < len(tensors):
            if _is_in_place(name, kwargs) and not variable and self._may_be_written(tensors, args):
                return self._write(func, args, kwargs)
            self._check_not_written(name, tensors, kwargs)
        without_gradient = self._with_graph and not torch.is_grad_enabled()
        if len(others) == len(tensors) or without_gradient:
            out = func(*args, **kwargs)
            if all(id(x) in self._made for x in variable):
                results = list(_tensors((out,)))
                cast = bool(tensors) and name in CASTS
                made = cast and id(tensors[0]) in self._made
                expanded = (made,) * len(results) if cast else self._decided(name, results)
                for x, has_rows in zip(results, expanded, strict=True):
                    if has_rows:
                        self._made[id(x)] = x
                        if self._is_new():
                            self._unsure[id(x)] = x
                    elif id(x) not in self._followed:
                        self._constants[id(x)] = x
            elif out is None or out is tensors[0]:  # which was written to
                for known in (self._constants, self._made):
                    known.pop(id(tensors[0]), None)
            elif all(id(x) in self._unsure for x in variable):
                self._unsure |= {id(x): x for x in _tensors((out,))}
            return out
        if variable:
            self.doubts += [name for x in variable if id(x) in self._unsure]
            self.calls[self._next(name)] = None
        scored = self._scored_operation(func, args, kwargs)
        if scored is not None:
            return scored
        if (
            variable and func is F.scaled_dot_product_attention
        ):  # under vmap a mask gets no gradient
            args, kwargs = self._with_mask_of_rows(args, kwargs)
            return func(*args, **kwargs)
        if variable:
            return self._mapped(func, args, kwargs, variable)
        out = func(*args, **kwargs)
        return self._follow_result(out, func, args, kwargs)

    def _may_be_written(self, tensors: list[Tensor], args: Any) -> bool:
        """Whether what is written to, the first, was made here, and nothing has rows."""
        target = tensors[0]
        has_rows = any(id(x) in self._expanded or id(x) in self._made for x in tensors)
        if not args or target is not args[0] or isinstance(target, nn.Parameter) or has_rows:
            return False
        kept = [*self._own.values(), *self._constants.values()]
        return not any(x is not target and _share_memory(x, target) for x in kept)

    def _write(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call that writes to its first argument, which is followed from then on."""
        leaves, spec = tree_flatten((args, kwargs))
        before, rows = args[0].detach().clone(), self._scored.rows
        at = [i for i, x in enumerate(leaves) if id(x) in self._followed or i == 0]
        made = [self._followed.get(id(leaves[i]), (before, None))[1] for i in at]

        def written(*copies: Tensor) -> Tensor:
            filled = list(leaves)
            for i, x in zip(at, copies, strict=True):
                filled[i] = x
            filled[0] = filled[0].clone()
            inner_args, inner_kwargs = tree_unflatten(filled, spec)
            func(*inner_args, **inner_kwargs)
            return filled[0]

        def copies() -> Tensor:
            same = before.expand(rows, *before.shape)  # of what was a constant
            values = (same if make is None else make() for make in made)
            return over_rows(written, *values, randomness="same")

        out = func(*args, **kwargs)
        for known in (self._constants, self._forms):
            known.pop(id(args[0]), None)

        def overwritten() -> Tensor:
            raise GraddotError(
                f"{func.__name__} writes into a tensor that was computed from its parameters, which is used"
                " by another name afterwards; write out of place"
            )

        for x, _ in list(self._followed.values()):
            if x is not args[0] and _share_memory(x, args[0]):
                self._follow(x, overwritten)
        self._follow(args[0], copies)
        return out

    def _check_not_written(self, name: str, tensors: list[Tensor], kwargs: Any) -> None:
        """Raise if a call with something followed writes where that, or a constant, is."""
        target = kwargs.get("out", tensors[0] if _is_in_place(name, kwargs) else None)
        if not isinstance(target, Tensor):
            return
        alone = (
            id(target) in self._own and not torch.is_grad_enabled()
        )  # as code that clips weights
        if not alone and (id(target) in self._followed or id(target) in self._constants):
            raise GraddotError(
                f"{name} writes into a tensor that was computed from its parameters, or into one"
                " without rows; write out of place"
            )

    def _with_mask_of_rows(self, args: Any, kwargs: Any) -> Any:
        """Attention's arguments with rows: a followed mask that is broadcast over the rows, (T, S),
        (heads, T, S) or (1, heads, T, S), as each row's own, (rows or rows·windows, heads, T, S)."""
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        query = args[0] if args else kwargs["query"]
        followed = (
            mask is not None and id(mask) in self._followed and id(mask) not in self._expanded
        )
        if followed and (mask.dim() < query.dim() or len(mask) == 1):
            own = self._copies(mask)  # (rows, *mask.shape)
            own = own.squeeze(1) if mask.dim() == query.dim() else own
            while own.dim() < query.dim():
                own = own.unsqueeze(1)
            own = own.repeat_interleave(len(query) // len(own), 0)
            args = (*args[:3], own, *args[4:])
            kwargs = {name: x for name, x in kwargs.items() if name != "attn_mask"}
        return self.as_rows((args, kwargs), one_for_all=True)

    def _follow(self, x: Tensor, copies: Callable[[], Tensor]) -> None:
        """copies() is x once for every row, (rows, *x.shape); it is called once at most."""
        made: list[Tensor] = []

        def once() -> Tensor:
            if not made:
                made.append(copies())
            return made[0]

        self._followed[id(x)] = x, once

    def _follow_result(self, out: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """Results of what is followed, as such."""
        leaves, spec = tree_flatten((args, kwargs))
        at = [i for i, x in enumerate(leaves) if id(x) in self._followed]
        sources = [leaves[i] for i in at]
        if any(out is x for x in sources):
            return out
        made = [self._followed[id(x)][1] for x in sources]
        own, transposed = self._form(sources[0])
        if own is not None and own.dim() <= 2 and isinstance(out, Tensor):
            if func in TRANSPOSES and own.dim() == 2:
                self._forms[id(out)] = own, not transposed
            elif getattr(func, "__name__", "") in CASTS and out.device == own.device:
                self._forms[id(out)] = own, transposed
        results: list[Tensor] = []

        def copied(*copies: Tensor) -> list[Tensor]:
            filled = list(leaves)
            for i, x in zip(at, copies, strict=True):
                filled[i] = x
            inner_args, inner_kwargs = tree_unflatten(filled, spec)
            return list(_tensors((func(*inner_args, **inner_kwargs),)))

        def result(k: int, dtype: torch.dtype) -> Tensor:
            if not results:
                copies = [make() for make in made]
                # A dropout mask without rows is one for all.
                results.extend(over_rows(copied, *copies, loop=_is_custom(func), randomness="same"))
            return results[k].to(dtype)  # autocast does not reach every operation under vmap

        outputs, name = list(_tensors((out,))), getattr(func, "__name__", "")
        if name in CASTS:
            expanded: tuple[bool, ...] = (id(sources[0]) in self._expanded,)
        else:
            expanded = self._decided(name, outputs)
        for k, (x, has_rows) in enumerate(zip(outputs, expanded, strict=True)):
            if has_rows:
                self._expanded.add(id(x))
                self.doubts += [name] * self._is_new()
            self._follow(x, lambda k=k, dtype=x.dtype: result(k, dtype))  # type: ignore[misc]
        repeated = func is Tensor.repeat and any(expanded) and len(args) > 1
        return self._repeated(out, args) if repeated else out

    def _repeated(self, out: Tensor, args: Any) -> Tensor:
        """The result of x.repeat(sizes) over the rows, row i of copy i, where the sizes show which
        part of it is which row's: what is followed would hold rows² times x."""
        x, sizes = args[0], args[1:]
        first, *others = sizes[0] if isinstance(sizes[0], (tuple, list)) else sizes
        times, left = divmod(first, self._scored.rows)
        if left or id(x) in self._expanded:
            return out
        values = over_rows(lambda x: x.repeat(times, *others), self._copies(x))
        return values.flatten(0, 1).to(out.dtype)  # type: ignore[no-any-return]

    def _decided(self, name: str, outputs: list[Tensor]) -> tuple[bool, ...]:
        """Whether the first dimension of each result of a call without rows is that of the rows: as
        was decided in the proof, else by its length. Casts, which depend on dtypes that the proof
        does not have, leave things as they are."""
        rows = self._scored.rows
        fits = tuple(x.dim() > 0 and x.shape[0] > 0 and x.shape[0] % rows == 0 for x in outputs)
        known = self._known.get(self._next(name))
        decided = fits
        if known is not None and len(known) == len(fits):
            decided = known if all(x or not y for x, y in zip(fits, known, strict=True)) else fits
        self.calls[self._last] = decided
        return decided

    def _is_new(self) -> bool:
        """Whether the last decision was of a call that the proof does not have."""
        return bool(self._known) and self._last not in self._known

    def _next(self, name: str) -> tuple[str, int]:
        self._counts[name] += 1
        self._last = name, self._counts[name]
        return self._last

    def _copies(self, x: Tensor) -> Tensor:
        """(rows, *x.shape) of what is followed, or a constant."""
        if id(x) not in self._followed:
            return x.expand(self._scored.rows, *x.shape)
        return self._followed[id(x)][1]()

    def _by_row(self, x: Tensor) -> Tensor:
        """What was expanded to the rows, with entry i from copy i."""
        rows = self._scored.rows
        entries = self._copies(x).unflatten(1, (rows, -1)).diagonal(dim1=0, dim2=1)
        return entries.movedim(-1, 0).flatten(0, 1)

    def _mapped(self, func: Any, args: Any, kwargs: Any, variable: list[Tensor]) -> Any:
        """A call with tensors that have rows, row by row, with copy i of what is followed for row i."""
        rows = self._scored.rows
        for x in variable:
            if x.dim() == 0 or x.shape[0] % rows:
                raise GraddotError(
                    f"{func.__name__} of its parameters and of a tensor of shape {tuple(x.shape)},"
                    f" whose first dimension does not hold {rows} rows"
                )
        largest = max(self._largest, max(x.numel() for x in variable) // rows)
        by_id = {id(x): x.unflatten(0, (rows, -1)) for x in variable}
        leaves, spec = tree_flatten((args, kwargs))
        at, mapped = [], []
        for i, x in enumerate(leaves):
            if id(x) in by_id:
                at.append(i)
                mapped.append(by_id[id(x)])
            elif id(x) in self._followed:
                at.append(i)
                expanded = id(x) in self._expanded
                if x.numel() > largest and not expanded:
                    raise too_large(self._module, x.numel())
                mapped.append(
                    self._by_row(x).unflatten(0, (rows, -1)) if expanded else self._copies(x)
                )

        def one(*values: Tensor) -> Any:
            filled = list(leaves)
            for i, x in zip(at, values, strict=True):
                filled[i] = x
            inner_args, inner_kwargs = tree_unflatten(filled, spec)
            return func(*inner_args, **inner_kwargs)

        kind = variable[0].device.type
        in_place = getattr(func, "__name__", "").startswith("__i") or func.__name__[-1] == "_"
        if torch.is_autocast_enabled(kind) and not in_place:  # see row_by_row
            dtype = functools.reduce(torch.promote_types, (x.dtype for x in mapped))
            mapped = [x.to(dtype) if x.is_floating_point() else x for x in mapped]
        with torch.autocast(kind, enabled=False):
            out = over_rows(one, *mapped, loop=_is_custom(func))
        return tree_map_only(Tensor, lambda x: x.flatten(0, 1), out)

    def _scored_operation(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """The call's result by a scored operation; None if there is none for it."""
        if func in MATMULS and len(args) == 2:
            return self._linear(args[0], args[1], matmul=True)
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func in TABLES:
            self._check_table(TABLES[func].bind(*args, **kwargs).arguments)
        if func is F.embedding:
            return self._embedding(*args, **kwargs)
        return self._norm(*args, **kwargs) if func is F.layer_norm else None

    def _linear(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, matmul: bool = False
    ) -> Tensor | None:
        own, transposed = self._form(weight)
        rows = self._scored.rows
        if own is None or own.dim() != 2:
            return None
        if bias is not None:
            form = self._form(bias)[0]
            bias = bias if form is None else form
            if self._is_computed(bias):
                return None
        product = lambda x: self._scored.linear_of_rows(
            x, own, bias, transposed=transposed != matmul
        )
        if self._is_one_for_all(input):
            if self._scored.step.tokens is not None:  # as many positions as tokens are no tokens
                return None
            out = input @ weight if matmul else F.linear(input, weight, bias)
            self._follow(out, lambda: product(self._copies(input)).to(out.dtype))
            return out
        input = self.as_rows(input)
        if input.dim() < 2 or input.shape[0] % rows:
            return None
        if input.shape[0] == rows:
            return product(input)
        return product(input.unflatten(0, (rows, -1))).flatten(0, 1)

    def _form(self, x: Tensor) -> tuple[Tensor | None, bool]:
        """The layer's own parameter that x is, or is a cast of, and whether it is transposed."""
        return self._forms.get(id(x), (self._own.get(id(x)), False))

    def _is_computed(self, x: Tensor | None) -> bool:
        return id(x) in self._followed and id(x) not in self._own

    def _check_table(self, arguments: dict[str, Any]) -> None:
        if id(arguments["weight"]) not in self._followed:
            return
        if any(arguments.get(name) for name in ("max_norm", "scale_grad_by_freq", "sparse")):
            raise Refused("max_norm, scale_grad_by_freq and sparse are not supported")

    def _embedding(  # type: ignore[no-untyped-def]
        self, input, weight, padding_idx=None, max_norm=None, norm_type=2.0,
        scale_grad_by_freq=False, sparse=False,
    ):  # fmt: skip
        own, transposed = self._form(weight)
        known = id(input) in self._followed or id(input) in self._constants
        if own is None or transposed:
            if known or padding_idx is None or id(weight) not in self._followed:
                return None
            return self._mapped(_padded, (input, weight, padding_idx % len(weight)), {}, [input])
        if padding_idx is not None:  # may count from the end
            padding_idx %= len(own)
        if id(input) not in self._constants:
            return self._scored.embedding(input, own, padding_idx).to(weight.dtype)
        out = F.embedding(input, weight, padding_idx)
        self._follow(out, lambda: self._scored.table(input, own, padding_idx).to(weight.dtype))
        return out

    def _norm(  # type: ignore[no-untyped-def]
        self, input, normalized_shape, weight=None, bias=None, eps=1e-5
    ):
        known = id(input) in self._followed or id(input) in self._constants
        if id(weight) not in self._own or known or self._is_computed(bias):
            return None
        return self._scored.layer_norm(input, list(normalized_shape), weight, bias, eps)


def _padded(ids: Tensor, weight: Tensor, padding_idx: int) -> Tensor:
    """F.embedding's, of which torch.vmap forgets that the table's row has no gradient."""
    out = F.embedding(ids, weight)
    return torch.where((ids == padding_idx).unsqueeze(-1), out.detach(), out)


_apply = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]


_running, _before, _lock = 0, None, threading.Lock()


@contextlib.contextmanager
def _functions_seen() -> Iterator[None]:
    """Inside of it, in whichever thread, calls of autograd functions are seen."""
    global _running, _before
    with _lock:
        if not _running:
            _before = torch.autograd.Function.__dict__["apply"]
            torch.autograd.Function.apply = classmethod(_seen_apply)  # type: ignore[method-assign, assignment]
        _running += 1
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if not _running:
                torch.autograd.Function.apply = _before  # type: ignore[method-assign, assignment]


def _seen_apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    """A call of an autograd function of one's own, which is not seen as other calls are."""
    if issubclass(cls, ScoredFunction) or not has_torch_function(args):
        return _apply(cls, *args, **kwargs)

    def function(*args: Any, **kwargs: Any) -> Any:
        return _apply(cls, *args, **kwargs)

    function.__name__, function.custom = cls.__name__, True  # type: ignore[attr-defined]
    return handle_torch_function(function, args, *args, **kwargs)


def _is_custom(func: Any) -> bool:
    return hasattr(func, "custom")


def over_rows(
    one: Callable[..., Any], *arguments: Any, loop: bool = False, randomness: str = "different"
) -> Any:
    """`one` mapped over the rows of its arguments: by torch.vmap, or in a loop where that cannot, as
    an autograd function of one's own, or entries that a mask picks."""
    if not loop:
        try:
            return torch.vmap(one, randomness=randomness)(*arguments)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
    rows = len(tree_leaves(arguments)[0])
    results = [one(*tree_map(lambda x: x[i], arguments)) for i in range(rows)]  # noqa: B023
    stack = lambda *x: torch.stack(x) if isinstance(x[0], Tensor) else x[0]
    return tree_map(stack, *results)


def too_large(module: nn.Module, size: int) -> GraddotError:
    return GraddotError(
        f"its {size:,} elements are too many to hold a gradient of every sample;"
        f" register_layer({type(module).__name__}) allows it"
    )


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _is_in_place(name: str, kwargs: Any) -> bool:
    """Whether a call of a function of this name writes to its first argument."""
    by_name = (name[-1:] == "_" and name[-2:] != "__") or name in WRITES
    return by_name or kwargs.get("inplace") is True


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, and in lists, tuples and dicts among them."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)
        elif isinstance(x, dict):
            yield from _tensors(x.values())
