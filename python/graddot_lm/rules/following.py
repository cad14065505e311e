"""Parameters followed through a layer's forward, so that each row uses a copy of its own.

Followed are the layer's own parameters, and those of layers inside that it uses without calling
them. What is computed from them and from constants alone is followed too, and computed once a copy,
by torch.vmap or in a loop, only where it meets a tensor that has rows: that one call is then mapped
over the rows. Where a parameter is the weight of F.linear, F.embedding, F.layer_norm or a matmul, the scored
operation runs instead, which needs no copies.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..checkpointing import runs_again_alone
from ..checks.digests import DROPOUTS
from ..errors import GraddotError
from ..scored import Scored, thread
from .followed import Followed, is_tensor, tensors_among
from .row_calls import functions_seen, is_custom, over_rows
from .scored_operations import scored_operation

WRITES = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"}
ONLY_THE_TYPE = {"to", "type_as"}  # of a second tensor
CASTS = {*ONLY_THE_TYPE, "type", "float", "double", "half", "bfloat16"}
# What leaves the first dimension what it was; proofs have other casts, and no dropout.
KEEPS_ROWS = CASTS | {function.__name__ for function in DROPOUTS}
TRANSPOSES = (Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
# What was decided in a forward, by function and number of its call: for each result whether its
# first dimension is that of the rows; None of a call that met rows.
Decided = tuple[bool, ...] | None
Calls = dict[tuple[str, int], Decided]


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
        """largest as in `Followed`.
        known: what was decided where this was proven; if nothing, this is that proof, whose number
        of rows divides no other dimension."""
        super().__init__()
        self._scored = scored
        self.calls: Calls = {}
        self._known, self._counts, self._last = known, Counter[str](), ("", 0)
        # What calls that the proof does not have made and is as long as the rows; and the calls in
        # which it matters whether it has rows.
        self._unsure: dict[int, Tensor] = {}
        self.doubts: list[str] = []
        self._with_graph, self._hooks = torch.is_grad_enabled(), _hooks()
        self._followed = Followed(module, scored, arguments, largest)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        before, thread.around = thread.around, self
        try:
            with functions_seen(), self:
                yield
        finally:
            thread.around = before

    def close(self) -> None:
        """Let go of what was followed; see `Followed.clear`."""
        self._followed.clear()
        self._unsure.clear()

    def as_rows(self, values: Any, *, one_for_all: bool = False) -> Any:
        """What is followed and has rows, as `Followed.as_rows` has it."""
        return self._followed.as_rows(values, one_for_all=one_for_all)

    def goes_on_inside(self, rule: Any, args: Any, kwargs: Any) -> bool:
        """Whether a layer inside that is called so runs as it is, its parameters followed, instead of by
        its rule: nothing that it gets has rows; or something that is followed has none, which a rule
        does not know, where the layer's own was to follow parameters."""
        tensors = [x for x in tree_leaves((args, kwargs)) if is_tensor(x)]
        one_for_all = [self._followed.is_one_for_all(x) for x in tensors]
        followed = any(
            x in self._followed for x, one in zip(tensors, one_for_all, strict=True) if one
        )
        return all(one_for_all) or (followed and getattr(rule, "follows", False))

    def reaches(self, args: Any, kwargs: Any) -> bool:
        """Whether a layer inside gets something that is followed."""
        return any(x in self._followed for x in tree_leaves((args, kwargs)))

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs, followed = kwargs or {}, self._followed
        if thread.around is not self:  # inside of a layer that is scored by itself
            return func(*args, **kwargs)
        tensors = list(tensors_among((*args, *kwargs.values())))
        name = getattr(func, "__name__", "")
        if name in ONLY_THE_TYPE:
            del tensors[1:]
        others = [x for x in tensors if x not in followed]
        # One that the forward makes of a constant, as peft transposes weights, has no rows either.
        known = lambda x: followed.is_constant(x) or isinstance(x, nn.Parameter)
        variable = [x for x in others if not known(x)]
        if len(others) < len(tensors):
            if _hooks() != self._hooks:
                raise runs_again_alone(f"{name} of its parameters")
            if _is_in_place(name, kwargs) and not variable and self._may_be_written(tensors, args):
                return self._write(func, args, kwargs)
            self._check_not_written(name, tensors, kwargs)
        without_gradient = self._with_graph and not torch.is_grad_enabled()
        if len(others) == len(tensors) or without_gradient:
            out = func(*args, **kwargs)
            if all(id(x) in followed.made for x in variable):
                results = list(tensors_among((out,)))
                keeps = bool(tensors) and name in KEEPS_ROWS
                made = keeps and id(tensors[0]) in followed.made
                expanded = (made,) * len(results) if keeps else self._decided(name, results)
                for x, has_rows in zip(results, expanded, strict=True):
                    if has_rows:
                        followed.made[id(x)] = x
                        if self._is_new():
                            self._unsure[id(x)] = x
                    elif x not in followed:
                        followed.constants[id(x)] = x
            elif out is None or out is tensors[0]:  # which was written to
                for known in (followed.constants, followed.made):
                    known.pop(id(tensors[0]), None)
            elif all(id(x) in self._unsure for x in variable):
                self._unsure |= {id(x): x for x in tensors_among((out,))}
            followed.note_picked(func, args, variable, out)
            return out
        if variable:
            self.doubts += [name for x in variable if id(x) in self._unsure]
            self.calls[self._next(name)] = None
        scored = scored_operation(followed, func, args, kwargs)
        if scored is not None:
            return scored
        if variable and func is F.scaled_dot_product_attention:
            # Under vmap a mask gets no gradient.
            args, kwargs = self._with_mask_of_rows(args, kwargs)
            return func(*args, **kwargs)
        if variable:
            return followed.mapped(func, args, kwargs, variable)
        out = func(*args, **kwargs)
        return self._follow_result(out, func, args, kwargs)

    def _may_be_written(self, tensors: list[Tensor], args: Any) -> bool:
        """Whether what is written to, the first, was made here, and nothing has rows."""
        target = tensors[0]
        has_rows = any(
            id(x) in self._followed.expanded or id(x) in self._followed.made for x in tensors
        )
        if not args or target is not args[0] or isinstance(target, nn.Parameter) or has_rows:
            return False
        kept = [*self._followed.own.values(), *self._followed.constants.values()]
        return not any(x is not target and _share_memory(x, target) for x in kept)

    def _write(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call that writes to its first argument, which is followed from then on."""
        leaves, spec = tree_flatten((args, kwargs))
        before, rows = args[0].detach().clone(), self._scored.rows
        at = [i for i, x in enumerate(leaves) if x in self._followed or i == 0]
        followed = self._followed
        made = [followed.maker(leaves[i]) if leaves[i] in followed else None for i in at]

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
        for known in (self._followed.constants, self._followed.forms):
            known.pop(id(args[0]), None)

        def overwritten() -> Tensor:
            raise GraddotError(
                f"{func.__name__} writes into a tensor that was computed from its parameters, which is used"
                " by another name afterwards; write out of place"
            )

        for x in self._followed.tensors():
            if x is not args[0] and _share_memory(x, args[0]):
                self._followed.follow(x, overwritten)
        self._followed.follow(args[0], copies)
        return out

    def _check_not_written(self, name: str, tensors: list[Tensor], kwargs: Any) -> None:
        """Raise if a call with something followed writes where that, or a constant, is."""
        target = kwargs.get("out", tensors[0] if _is_in_place(name, kwargs) else None)
        if not isinstance(target, Tensor):
            return
        # As code that clips weights.
        alone = self._followed.is_own(target) and not torch.is_grad_enabled()
        if not alone and (target in self._followed or self._followed.is_constant(target)):
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
            mask is not None and mask in self._followed and id(mask) not in self._followed.expanded
        )
        if followed and (mask.dim() < query.dim() or len(mask) == 1):
            own = self._followed.copies(mask)  # (rows, *mask.shape)
            own = own.squeeze(1) if mask.dim() == query.dim() else own
            while own.dim() < query.dim():
                own = own.unsqueeze(1)
            own = own.repeat_interleave(len(query) // len(own), 0)
            args = (*args[:3], own, *args[4:])
            kwargs = {name: x for name, x in kwargs.items() if name != "attn_mask"}
        return self._followed.as_rows((args, kwargs), one_for_all=True)

    def _follow_result(self, out: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """Results of what is followed, as such."""
        leaves, spec = tree_flatten((args, kwargs))
        at = [i for i, x in enumerate(leaves) if x in self._followed]
        sources = [leaves[i] for i in at]
        if any(out is x for x in sources):
            return out
        made = [self._followed.maker(x) for x in sources]
        own, transposed = self._followed.form(sources[0])
        if own is not None and own.dim() <= 2 and isinstance(out, Tensor):
            if func in TRANSPOSES and own.dim() == 2:
                self._followed.forms[id(out)] = own, not transposed
            elif getattr(func, "__name__", "") in CASTS and out.device == own.device:
                self._followed.forms[id(out)] = own, transposed
        results: list[Tensor] = []

        def copied(*copies: Tensor) -> list[Tensor]:
            filled = list(leaves)
            for i, x in zip(at, copies, strict=True):
                filled[i] = x
            inner_args, inner_kwargs = tree_unflatten(filled, spec)
            return list(tensors_among((func(*inner_args, **inner_kwargs),)))

        def result(k: int, dtype: torch.dtype) -> Tensor:
            if not results:
                copies = [make() for make in made]
                # A dropout mask without rows is one for all.
                results.extend(over_rows(copied, *copies, loop=is_custom(func), randomness="same"))
            return results[k].to(dtype)  # autocast does not reach every operation under vmap

        outputs, name = list(tensors_among((out,))), getattr(func, "__name__", "")
        if name in KEEPS_ROWS:
            expanded: tuple[bool, ...] = (id(sources[0]) in self._followed.expanded,)
        else:
            expanded = self._decided(name, outputs)
        for k, (x, has_rows) in enumerate(zip(outputs, expanded, strict=True)):
            if has_rows:
                self._followed.expanded.add(id(x))
                self.doubts += [name] * self._is_new()
            self._followed.follow(x, lambda k=k, dtype=x.dtype: result(k, dtype))  # type: ignore[misc]
        repeated = func is Tensor.repeat and any(expanded) and len(args) > 1
        return self._repeated(out, args) if repeated else out

    def _repeated(self, out: Tensor, args: Any) -> Tensor:
        """The result of x.repeat(sizes) over the rows, row i of copy i, where the sizes show which
        part of it is which row's: what is followed would hold rows² times x."""
        x, sizes = args[0], args[1:]
        first, *others = sizes[0] if isinstance(sizes[0], (tuple, list)) else sizes
        times, left = divmod(first, self._scored.rows)
        if left or id(x) in self._followed.expanded:
            return out
        values = over_rows(lambda x: x.repeat(times, *others), self._followed.copies(x))
        return values.flatten(0, 1).to(out.dtype)  # type: ignore[no-any-return]

    def _decided(self, name: str, outputs: list[Tensor]) -> tuple[bool, ...]:
        """Whether the first dimension of each result of a call without rows is that of the rows: as
        was decided in the proof, else by its length. Not asked of what leaves that as it is, as casts,
        which depend on dtypes that the proof does not have."""
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


def _hooks() -> Any:
    """What saved tensors go through here."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _is_in_place(name: str, kwargs: Any) -> bool:
    """Whether a call of a function of this name writes to its first argument."""
    by_name = (name[-1:] == "_" and name[-2:] != "__") or name in WRITES
    return by_name or kwargs.get("inplace") is True
