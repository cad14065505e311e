"""The rule for layers that have none: their own forward, with their parameters scored in it.

Two ways, tried in this order. *In place*: the layer's forward runs as it is, with the layer's own
parameters followed through it (following.py); the layers inside have their own rules. *Row by row*:
the forward is mapped over the samples, each with its own copy of the parameters, those of the
layers inside included; the backward then holds a gradient of every sample, so they must be small.
Whichever is proven against autograd on the layer's first input is used; a layer for which neither
is, is refused with the reasons.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from ..checks.digests import uncached
from ..errors import GraddotError
from ..scored import Scored, ScoredForward, first_tensor
from .following import Calls, Decided, Following
from .row_calls import over_rows, too_large
from .scored_operations import Refused

Rule = Callable[..., Any]
LARGEST = 2**22  # elements whose gradient may be held for every sample of a layer
_WHAT_TO_DO = "\nWrite a rule (graddot_lm.register_layer), or freeze "


class NoRows(GraddotError):
    """A layer, of this name, returns a tensor without rows, though it gets some with."""

    def __init__(self, message: str, layer: str) -> None:
        super().__init__(message)
        self.layer = layer


class ProvenRule:
    """The first way of several that is proven for one layer; ways make what is proven, by name, given
    how many elements of a parameter may have a gradient of every row.

    Proven again when the layer's mode or its arguments' kind changes, when the first batch of
    several rows comes after batches of one, and when the layer does with its parameters what it did
    not do in the proof. Positions, (T,), beside the layer's input may be as many as there are rows:
    where nothing can be proven with an entry a row, they are taken for the same in all. Of what is
    longer it is tried last that it holds several entries of each row, (rows·S, ...), as a bias of
    attention does, by heads.

    smaller makes of a layer and its arguments a smaller one that does the same, or None: it is proven on
    that, or else on the layer itself.
    """

    def __init__(
        self,
        ways: dict[str, Callable[[float], Rule]],
        largest: float = LARGEST,
        smaller: Callable[[nn.Module, Any, Any], tuple[nn.Module, Any] | None] | None = None,
    ) -> None:
        self._ways, self._largest, self._smaller = ways, largest, smaller
        self.follows = "in place" in ways
        # By kind of call; with which of its arguments are the same for all rows, and which hold several
        # entries of each.
        self._proven: dict[Any, tuple[Rule, list[int], list[int]]] = {}
        self._of_tokens: ProvenRule | None = None
        self._proving = False

    def __call__(self, module: nn.Module, scored: Scored, *args: Any, **kwargs: Any) -> Any:
        scored.require_rows_first()
        if scored.step.packed:
            return self._by_token(module, scored, args, kwargs)
        leaves = tree_leaves((args, kwargs))
        key = (module.training, scored.rows == 1, *(_kind(scored, x) for x in leaves))
        if key not in self._proven:
            if self._proving:  # or it would go on for ever
                raise GraddotError(
                    f"layer {scored.name or '(itself)'} of type {type(module).__name__} has got a forward that"
                    " calls the layer itself, also from a copy of it, on which its rule would be proven; put it"
                    " there before engine.attach(), or use functools.wraps"
                )
            self._proving = True
            try:
                self._proven[key] = self._prove(module, scored, args, kwargs)
            finally:
                self._proving = False
        way, same, several = self._proven[key]
        scored.same += [leaves[i] for i in same]
        scored.several += [_in_rows(scored, leaves[i]) for i in several]
        with uncached():  # a weight is followed, or of each row, in one call
            out = way(module, scored, *args, **kwargs)
        if isinstance(way, InPlace):
            way.check(module, scored, args, kwargs)
        return out

    def _prove(
        self, module: nn.Module, scored: Scored, args: Any, kwargs: Any
    ) -> tuple[Rule, list[int], list[int]]:
        from ..checks.layer_proof import prove  # it attaches rules, this one among them

        few = self._smaller(module, args, kwargs) if self._smaller is not None else None
        if few is not None:
            for way in self._ways.values():
                with contextlib.suppress(GraddotError):
                    make = functools.partial(way, self._largest)
                    return prove(few[0], scored, make, *few[1]), [], []
        reasons = []
        leaves, main = tree_leaves((args, kwargs)), first_tensor(args, kwargs)
        others = [(i, x) for i, x in enumerate(leaves) if x is not main]
        positions = [i for i, x in others if _may_be_positions(scored, x)]
        long = [i for i, x in others if _may_hold_several(scored, x)]
        given, without_rows = scored.same, None
        readings = [
            ([], []),
            *([(positions, [])] if positions else []),
            *([([], long)] if long else []),
        ]
        for same, several in readings:
            scored.same = [*given, *(leaves[i] for i in same)]
            scored.several = [leaves[i] for i in several]
            for name, way in self._ways.items():
                try:
                    make = functools.partial(way, self._largest)
                    rule = prove(module, scored, make, args, kwargs)
                    scored.same, scored.several = given, []
                    return rule, same, several
                except GraddotError as error:
                    if not same and not several:
                        # Of a layer around others it is said once.
                        reasons.append(f"{name}: {str(error).partition(_WHAT_TO_DO)[0]}")
                        if isinstance(error, NoRows):
                            without_rows = error.layer
                    if isinstance(error, Refused):
                        break
        own = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
        is_scored = scored.step.val_rows or any(id(p) in scored.step.leaf_of for p in own.values())
        if own and not is_scored:
            return _as_it_is, [], []
        what = ", ".join(f"{scored.name}.{n}".lstrip(".") for n in own)
        what = (
            f"{what}, or with given directions exclude it (exclude=[...])"
            if own
            else "its parameters"
        )
        message = (
            f"layer {scored.name or '(itself)'} of type {type(module).__name__} has no rule that"
            " holds:\n  " + "\n  ".join(reasons) + _WHAT_TO_DO + what
        )
        raise GraddotError(message) if without_rows is None else NoRows(message, without_rows)

    def _by_token(self, module: nn.Module, scored: Scored, args: Any, kwargs: Any) -> Any:
        """The tokens of a packed row as rows, for a layer that looks at each by itself. There are too
        many for parameters larger than a token to have a gradient of each."""
        from ..checks.layer_proof import check_by_token

        holders = [module, *(x for x in tree_leaves((args, kwargs)) if isinstance(x, nn.Module))]
        inside = [part for one in holders for part in one.modules() if part is not module]
        called = [part for part in inside if type(part).forward is not nn.Module.forward]
        if any(isinstance(part.__dict__.get("forward"), ScoredForward) for part in called):
            raise GraddotError(
                f"layer {scored.name or '(itself)'} of type {type(module).__name__} has parameters of its"
                " own around scored layers, and cannot be scored for the samples of a packed row; give"
                " every sample a row of its own, or freeze them"
            )
        rule = self._of_tokens = self._of_tokens or ProvenRule(self._ways, 0)
        tokens, proven = Tokens(scored), len(rule._proven)
        inner = Scored(scored.name, scored.step.of_tokens(), scored.own_forward)
        inner_args, inner_kwargs = tokens.as_rows((args, kwargs))
        out = tokens.as_one(rule(module, inner, *inner_args, **inner_kwargs))
        if len(rule._proven) > proven:
            check_by_token(module, scored.name, tokens, args, kwargs)
        return out


class Tokens:
    """The tokens of a packed row as rows, (T, 1, ...), and back; a flat layer, (T, ...), has them so."""

    def __init__(self, scored: Scored) -> None:
        self._flat = scored.step.row_tokens(scored.name) > 0
        self._number = scored.step.tokens

    def as_rows(self, values: Any) -> Any:
        is_row = lambda x: not self._flat and x.shape[:2] == (1, self._number)
        return tree_map_only(Tensor, lambda x: x.transpose(0, 1) if is_row(x) else x, values)

    def as_one(self, values: Any) -> Any:
        is_rows = lambda x: not self._flat and x.shape[:2] == (self._number, 1)
        return tree_map_only(Tensor, lambda x: x.transpose(0, 1) if is_rows(x) else x, values)


def general_rule(*, any_size: bool = False) -> ProvenRule:
    """For a layer of which nothing is known; any_size lets it hold large gradients by row."""
    largest = math.inf if any_size else LARGEST
    return ProvenRule(
        {"in place": InPlace, "row by row": lambda most: functools.partial(row_by_row, most)},
        largest,
    )


def caller_rule() -> ProvenRule:
    """For a module without parameters to score, around a layer whose input has no rows: what that
    returns is followed, as it is, to where it meets rows."""
    return ProvenRule({"in place": InPlace}, LARGEST)


def _as_it_is(module: nn.Module, scored: Scored, *args: Any, **kwargs: Any) -> Any:
    """For a layer whose own parameters are excluded, with given directions."""
    return scored.own_forward(*args, **kwargs)


def _kind(scored: Scored, x: Any) -> Any:
    """What of an argument a proof is for: a layer may do another thing for another flag."""
    if isinstance(x, Tensor):
        return scored.has_rows(x)
    return x if isinstance(x, (bool, str)) else None


def _may_be_positions(scored: Scored, x: Any) -> bool:
    """Whether it is (T,) whole numbers, as many as there are rows."""
    whole = isinstance(x, Tensor) and x.dtype in (torch.int64, torch.int32)
    return whole and x.dim() == 1 and scored.has_rows(x)


def _may_hold_several(scored: Scored, x: Any) -> bool:
    """Whether its length is a multiple of the rows."""
    long = isinstance(x, Tensor) and x.dim() > 1 and x.shape[0] > scored.rows
    return long and x.shape[0] % scored.rows == 0 and not scored.has_rows(x)


def _in_rows(scored: Scored, x: Tensor) -> Tensor:
    """A tensor that holds several entries of each row. Raises GraddotError if it cannot."""
    if x.shape[0] % scored.rows:
        raise GraddotError(
            f"layer {scored.name} got an input of shape {tuple(x.shape)}, which held several entries of"
            f" each row before, in a batch of {scored.rows} rows"
        )
    return x


class InPlace:
    """The layer's forward with the parameters that it uses followed (following.py).

    The first call is the proof's. What was decided in it, call by call, holds for all later ones:
    that a table has as many entries as the batch has rows means nothing.
    """

    def __init__(self, largest: float) -> None:
        self._largest = largest
        self._known: Calls = {}
        self._proven: list[Calls] = []
        self._last: Calls = {}
        self._doubts: list[str] = []

    def __call__(self, module: nn.Module, scored: Scored, *args: Any, **kwargs: Any) -> Any:
        following = Following(module, scored, (args, kwargs), self._largest, self._known)
        with following.running():
            out = scored.own_forward(*args, **kwargs)
        rows = following.as_rows(out, one_for_all=True)
        if rows is not out and isinstance(out, Tensor) and out.shape[:1] == (1,):
            rows = scored.expanded(rows)
        self._last, self._doubts = following.calls, following.doubts
        following.close()
        if not self._proven:
            self._known = dict(self._last)
            self._proven.append(self._last)
        return rows

    def check(self, module: nn.Module, scored: Scored, args: Any, kwargs: Any) -> None:
        """After a call: if it did something new, prove that, and that it was done as in the proof."""
        if self._last in self._proven:
            return
        from ..checks.layer_proof import prove

        def decisions(skip: int) -> Calls:
            make = lambda: InPlace(self._largest)
            return prove(module, scored, make, args, kwargs, skip=skip)._known

        def differences(proof: Calls) -> list[str]:
            return [call[0] for call, x in self._last.items() if proof.get(call, x) != x]

        proof = decisions(0)
        if differ := differences(proof):
            # Perhaps dimensions that are made inside were multiples of one proof's rows or the other's.
            other = decisions(1)
            if proof.keys() == other.keys():
                other = {call: _agreed(proof[call], x, True) for call, x in other.items()}
            proof, differ = other, differences(other)
        if differ or self._doubts:
            raise GraddotError(
                f"layer {scored.name or '(itself)'} of type {type(module).__name__} did something new"
                f" with its parameters ({(differ + self._doubts)[0]}), in a batch of {scored.rows}"
                " rows in which it cannot be told whether a dimension is that of the rows; use"
                " another number of rows"
            )
        same = proof.keys() == self._known.keys()
        for call, decided in proof.items():
            self._known[call] = _agreed(self._known.get(call, decided), decided, same)
        self._proven.append(self._last)


def _agreed(one: Decided, other: Decided, same: bool) -> Decided:
    """What two proofs decided of a call. In the same sequence of calls a dimension that is not of the
    rows in one of them was a multiple of the other's rows by chance."""
    if same and one is not None and other is not None and len(one) == len(other):
        return tuple(x and y for x, y in zip(one, other, strict=True))
    return one if one == other else None


def row_by_row(largest: float, module: nn.Module, scored: Scored, *args: Any, **kwargs: Any) -> Any:
    """The forward mapped over the samples, each with its own copy of all parameters inside."""
    size = sum(p.numel() for p in module.parameters() if p.requires_grad)
    if size > largest:
        raise too_large(module, size)
    own = {n: scored.per_sample(p) for n, p in module.named_parameters() if p.requires_grad}
    leaves, spec = tree_flatten((args, kwargs))
    leaves = [None if _is_new_cache(module, scored, x) else x for x in leaves]
    at = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and scored.has_rows(x)]
    returned: list[Any] = []  # what the forward returns, tensors to be filled in, and its nesting

    def one(parameters: dict[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
        filled = list(leaves)
        for i, x in zip(at, inputs, strict=True):
            filled[i] = x
        inner_args, inner_kwargs = tree_unflatten(filled, spec)
        with _replaced(module, parameters), _plain_children(module):
            returned[:] = tree_flatten(scored.own_forward(*inner_args, **inner_kwargs))
        return [x for x in returned[0] if isinstance(x, Tensor)]

    samples = [leaves[i].unflatten(0, (scored.rows, -1)) for i in at]
    first = next(module.parameters())
    kind = first.device.type
    if torch.is_autocast_enabled(kind):  # which does not reach every operation under vmap
        samples = [x.to(first.dtype) if x.is_floating_point() else x for x in samples]
    with torch.autocast(kind, enabled=False):
        outputs = iter(over_rows(one, own, samples))
    filled = [next(outputs).flatten(0, 1) if isinstance(x, Tensor) else x for x in returned[0]]
    return tree_unflatten(filled, returned[1])


def _is_new_cache(module: nn.Module, scored: Scored, x: Any) -> bool:
    """Whether x is a cache of transformers in which a recurrent layer has no state yet: in training
    it is none. Writing a state to it is not for one row of the map.

    Raises GraddotError if there is one.
    """
    index, has_state = getattr(module, "layer_idx", None), getattr(x, "has_previous_state", None)
    if index is None or has_state is None:
        return False
    if has_state(index):
        raise GraddotError(
            f"layer {scored.name} goes on from a state in its cache, of which samples have no part;"
            " leave past_key_values out"
        )
    return True


@contextlib.contextmanager
def _replaced(module: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Other tensors in the place of some of the parameters in a module, tied ones everywhere."""
    by_id = {id(module.get_parameter(name)): value for name, value in values.items()}
    places = [
        (part._parameters, name, p)
        for part in module.modules()
        for name, p in part._parameters.items()
        if id(p) in by_id
    ]
    for parameters, name, p in places:
        parameters[name] = by_id[id(p)]  # type: ignore[assignment]
    try:
        yield
    finally:
        for parameters, name, p in places:
            parameters[name] = p


@contextlib.contextmanager
def _plain_children(module: nn.Module) -> Iterator[None]:
    """The layers inside of a module with their own forwards, as if no engine were attached.

    Under vmap nothing seems to need a gradient, and PyTorch's transformer layers in evaluation mode
    would take a path that has none.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    scored = {
        child: child.__dict__["forward"]
        for child in module.modules()
        if child is not module and isinstance(child.__dict__.get("forward"), ScoredForward)
    }
    for child, forward in scored.items():
        child.forward = forward.own_forward
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for child, forward in scored.items():
            child.forward = forward
