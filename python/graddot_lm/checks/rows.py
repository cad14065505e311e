"""How the samples lie in every layer's input, seen by leaving half of them out.

Before the first step the model runs without gradients on all rows, and on so many halves of them that
each row is once without each other. A layer whose input is that of its rows alone is safe; one whose
input changed when other samples were left out gets mixed samples and is refused. The same runs tell
whether a layer's input has the rows as its first dimension, one after the other in it (rows·T, D), or
not at all (position ids).
"""

import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import GraddotError
from .digests import OUTPUTS, Digest, NoDropout, close, digests, equal, must_run, own_random
from .parts import Entries, filled_up, splits_of, take_inputs

# "rows" (rows, ..., D); "second" (T, rows, ..., D); "same" for every row; T where a row's T tokens
# lie together, (rows·T, ..., D) or (1, rows·T, ..., D); "unseen" where noise kept a layer from being
# judged.
Layout = str | int


class MixedSamples(GraddotError):
    """Layers get inputs of which it is not known how they hold the samples, by `layers`, their names.
    beside: in some calls one that is the same for every row, and rows in all others."""

    def __init__(self, message: str, layers: Sequence[str], *, beside: bool = False) -> None:
        super().__init__(message)
        self.layers, self.beside = layers, beside


class KnownLayouts:
    """The layouts found so far, by mode of the model: for all inputs, or, where layers see tokens
    without their rows, for inputs of the same shapes only. A mode is anything hashable."""

    def __init__(self) -> None:
        self._found: dict[Any, dict[str, Layout]] = {}
        self._asked: set[Any] = set()
        self._of_tokens: dict[Any, dict[str, Layout]] = {}

    def of(self, mode: Any, shapes: Sequence[torch.Size]) -> dict[str, Layout] | None:
        """Those of inputs of these shapes, the rows' dimension left out; None if not known."""
        return self._found.get(mode, self._found.get((mode, *shapes)))

    def are_for_all(self, mode: Any) -> bool:
        """Whether those found in this mode are for all inputs."""
        return mode in self._found

    def learn(self, mode: Any, shapes: Sequence[torch.Size], layouts: dict[str, Layout]) -> None:
        """What `find_layouts` found for such inputs."""
        flat = any(isinstance(layout, int) for layout in layouts.values())
        if flat:  # also where a layer came late to layouts that were for all inputs
            self._found.pop(mode, None)
        # Of ids (rows, 1) or vectors (rows, 1, D) it cannot be told whether a layer gets (rows·T, D).
        one_token = any(len(shape) in (1, 2) and shape[0] == 1 for shape in shapes)
        if layouts:
            self._found[(mode, *shapes) if flat or one_token else mode] = layouts

    def learn_of_tokens(self, mode: Any, tokens: int, layouts: dict[str, Layout]) -> None:
        """The same of a packed row, where whatever is flat is all its tokens: rows have any number."""
        if all(layout == tokens for layout in layouts.values() if isinstance(layout, int)):
            self._of_tokens[mode] = layouts

    def of_tokens(self, mode: Any, tokens: int) -> dict[str, Layout] | None:
        """Those of a packed row of other samples."""
        found = self._of_tokens.get(mode)
        flat = lambda layout: tokens if isinstance(layout, int) else layout
        return None if found is None else {name: flat(x) for name, x in found.items()}

    def is_new(self, mode: Any, shape: torch.Size) -> bool:
        """Whether what has this shape may come in a batch of unknown layouts: asked before for other
        shapes only."""
        new = mode not in self._found and (mode, shape) not in self._asked
        self._asked.add((mode, shape))
        return new


def find_layouts(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    args: Any,
    kwargs: Any,
    rows: int,
    on_layer: Callable[[nn.Module, str], None] = lambda module, name: None,
    followed: Collection[str] = (),
    entries: Entries | None = None,
    *,
    thorough: bool = True,
    runs: int = 0,
    agreed: Callable[[bool], bool] = bool,
    on_output: Callable[[Sequence[int], Any], None] = lambda part, out: None,
) -> dict[str, Layout]:
    """By layer name, how its input holds the samples; on_layer may refuse a layer before it runs, and
    on_output gets what the model returns for which rows.
    followed are those of the layers whose forward is followed (following.py). Where it is not
    thorough, rows are left out by halves only, for a model that was checked on others before. It is
    run on at least `runs` parts of the rows, as on the other processes that share it, and once more
    where that is agreed: agreed(x) is whether x is so in any of them.

    A layer whose input is random in a way of its own cannot be judged: "unseen". In a batch of one
    row all is that row's; this says nothing about larger batches.

    Raises MixedSamples for layers whose inputs depend on other samples of the batch, or hold
    them in no such way (tokens picked out of the batch, say), and for a model whose outputs do.
    """
    if rows < 2:
        of_one = functools.partial(on_output, range(rows))
        return _layouts_of_one(model, layers, args, kwargs, on_layer, of_one)
    entries = entries or {}
    kept = [part for split in splits_of(rows, thorough or bool(entries)) for part in split]
    if rows == 3:
        kept = [*kept[::2], [0, 1]]  # every pair, and no row alone
    kept = filled_up(kept, runs)
    with torch.no_grad(), own_random(), NoDropout():
        of_all = functools.partial(on_output, range(rows))
        whole = digests(model, layers, args, kwargs, on_layer, followed, of_all)
        outputs, found = whole[OUTPUTS], dict[str, Layout | None]()
        for index in kept:
            few_args, few_kwargs = take_inputs((args, kwargs), index, rows, entries)
            fails = f"runs on the joint batch of {rows} rows, but not on {len(index)} of them"
            with must_run(fails, "keep samples apart"):
                of_part = functools.partial(on_output, index)
                part = digests(model, layers, few_args, few_kwargs, on_output=of_part)
            with_rows = _with_rows(outputs, part[OUTPUTS], rows, len(index))
            whole[OUTPUTS] = [outputs[i] for i in with_rows]
            part[OUTPUTS] = [part[OUTPUTS][i] for i in with_rows]
            layouts = {
                name: _layout(name, whole[name], part.get(name, []), rows, index) for name in whole
            }
            # Noise of the model's own, mixed samples, or what has rows by one part of them only?
            unclear = {name for name in whole if layouts[name] != found.get(name, layouts[name])}
            unclear |= {name for name in whole if layouts[name] is None}
            if agreed(bool(unclear)):
                torch.seed()
                again = digests(model, layers, args, kwargs)
                again[OUTPUTS] = [again[OUTPUTS][i] for i in with_rows]
                _check_random(unclear, whole, again, rows, rows - len(index))
                layouts |= dict.fromkeys(unclear)
            found = {**layouts, **{name: None for name, x in found.items() if x is None}}
        flat = {name: whole[name] for name, x in found.items() if _may_be_picked(name, x, whole)}
        if agreed(bool(flat)):
            _check_not_picked(model, layers, args, kwargs, rows, flat, agreed)
    return {name: layout or "unseen" for name, layout in found.items() if name != OUTPUTS}


def _layouts_of_one(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    args: Any,
    kwargs: Any,
    on_layer: Callable[[nn.Module, str], None],
    on_output: Callable[[Any], None],
) -> dict[str, Layout]:
    """`find_layouts` of a batch of one row."""
    with torch.no_grad(), own_random(), NoDropout():
        alone = digests(model, layers, args, kwargs, on_layer, on_output=on_output)
    of_one = {name: {_layout_of_one(digest) for digest in alone[name]} for name in alone}
    return {
        name: layouts.pop() if len(layouts) == 1 else "unseen"
        for name, layouts in of_one.items()
        if name != OUTPUTS
    }


def _check_random(
    unclear: Collection[str],
    whole: Mapping[str, list[Digest]],
    again: Mapping[str, list[Digest]],
    rows: int,
    without: int,
) -> None:
    """Raise MixedSamples for layers whose inputs are the same in a second run on all rows: what changed
    without some of them was no noise of the model's own."""
    same = lambda name: equal(whole[name], again.get(name, []))
    if mixed := [name for name in whole if name in unclear and same(name)]:
        shape = whole[mixed[0]][0].shape
        raise MixedSamples(_mixed(mixed[0], shape, rows, without), mixed)


def _check_not_picked(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    args: Any,
    kwargs: Any,
    rows: int,
    flat: Mapping[str, list[Digest]],
    agreed: Callable[[bool], bool],
) -> None:
    """Raise GraddotError if a flat layer's input, (rows·T, D), is of tokens picked by their values:
    as many as there are rows, or a multiple, but of which row each is nobody could tell.

    Seen in rows whose tokens are all alike, of which none or all are picked.
    """
    begin = rows // 2

    def alike(only: Tensor | None, x: Tensor) -> Tensor:
        if (
            x.dim() < 2
            or x.shape[0] != rows
            or x.shape[1] == 0
            or (only is not None and only is not x)
        ):
            return x
        return torch.cat([x[:begin], x[begin:, :1].expand_as(x[begin:])])

    def seen(only: Tensor | None) -> dict[str, list[Digest]] | None:
        changed = tree_map_only(Tensor, functools.partial(alike, only), (args, kwargs))
        try:
            return digests(model, layers, *changed)
        except Exception:  # noqa: BLE001 - the model's own code may refuse such rows
            return None

    runs = [seen(None)]
    if agreed(runs == [None]):  # an image has its tokens; but a mask may be another
        runs = [seen(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    for found, (name, calls) in itertools.product(filter(None, runs), flat.items()):
        pairs = list(zip(found.get(name, []), calls, strict=False))
        if any(x.shape[:2] != y.shape[:2] and len(x.shape) == len(y.shape) for x, y in pairs):
            raise MixedSamples(
                f"layer {name} gets tokens that are picked by their values (of shape"
                f" {tuple(calls[0].shape)} in this batch), of which it is not known which row each"
                " belongs to; run it on all tokens, and let the loss ignore the others",
                [name],
            )


def _may_be_picked(name: str, layout: Layout | None, whole: Mapping[str, list[Digest]]) -> bool:
    """Whether a layer's input may be tokens picked out of the batch, which have lost a dimension:
    (rows·T, D), or (rows, D) if there is one a row."""
    flat = isinstance(layout, int) or (layout == "rows" and _is_flat(whole[name]))
    return name != OUTPUTS and flat


def _is_flat(calls: list[Digest]) -> bool:
    """Whether a layer with the rows as its input's first dimension gets one vector, or id, a row."""
    return any(len(x.shape) == (2 if x.values.is_floating_point() else 1) for x in calls)


def _mixed(name: str, shape: torch.Size, rows: int, without: int) -> str:
    what = "the model has an output" if name == OUTPUTS else f"layer {name} gets an input"
    return (
        f"{what} (of shape {tuple(shape)}) that depends on other samples of the batch of {rows}"
        f" rows, or that does not hold them one after the other: when {without} of the rows were"
        " left out, the others' part changed"
    )


def _with_rows(whole: list[Digest], part: list[Digest], rows: int, later: int) -> list[int]:
    """Which outputs have rows as their first or second dimension; a mask may do otherwise."""
    found = []
    for i, (x, y) in enumerate(zip(whole, part, strict=False)):
        if x.shape[:2] == (rows, rows) and y.shape[:2] == (later, later):
            raise GraddotError(
                f"the model has an output of shape {tuple(x.shape)}, with an entry for every pair of"
                f" its {rows} rows, as a contrastive loss compares them: samples have no loss of"
                " their own there"
            )
        for at in (0, 1):
            if _differ_at(at, x.shape, y.shape) and (x.shape[at], y.shape[at]) == (rows, later):
                found.append(i)
    return found


def _differ_at(at: int, a: torch.Size, b: torch.Size) -> bool:
    """Whether one dimension is all in which two shapes differ."""
    return len(a) == len(b) and [i for i in range(len(a)) if a[i] != b[i]] == [at]


def _layout(
    name: str, whole: list[Digest], part: list[Digest], rows: int, index: list[int]
) -> Layout | None:
    """The layout that a layer's calls share; None if a call has none."""
    if len(whole) != len(part):
        return None
    calls = [(x, _layout_of_call(x, y, rows, index)) for x, y in zip(whole, part, strict=True)]
    layouts = {layout for _, layout in calls}
    if len(layouts) > 1:
        is_beside = lambda x, layout: layout == "same" and x.caller is not None
        layouts = {layout for x, layout in calls if not is_beside(x, layout)}
        _check_beside(name, [x for x, layout in calls if is_beside(x, layout)], layouts, rows)
    if name != OUTPUTS and None not in layouts and len(layouts) > 1:
        shapes = ", ".join(str(tuple(digest.shape)) for digest in whole)
        raise MixedSamples(
            f"layer {name} is called several times, and its inputs (of shapes {shapes}) hold the"
            f" {rows} rows of the batch in different ways; use one layer a way",
            [name],
            beside="same" in layouts and len(layouts) == 2,
        )
    return None if None in layouts else layouts.pop() if layouts else "rows"


def _check_beside(
    name: str, calls: list[Digest], layouts: Collection[Layout | None], rows: int
) -> None:
    """Calls with inputs that have no rows, by layers that are followed: which know it, and do not
    have the layer scored there. Of a layer that is not inside of theirs that is not proven.

    Raises GraddotError where such an input might then be taken for one of the layouts.
    """
    sizes = {rows * layout if isinstance(layout, int) else rows for layout in layouts}
    for x in calls:
        at = 1 if "second" in layouts or x.shape[:1] == (1,) else 0
        inside = x.caller == "" or name.startswith(f"{x.caller}.")
        if not inside and sizes & set(x.shape[at : at + 1]):
            raise GraddotError(
                f"layer {name} is called with an input of shape {tuple(x.shape)} that has no rows, by"
                f" layer {x.caller}, in a batch of {rows} rows, in which it might be taken for them;"
                " use another number of rows"
            )


def _layout_of_call(whole: Digest, part: Digest, rows: int, index: list[int]) -> Layout | None:
    if not whole.shape.numel() or not part.shape.numel():  # tokens picked from the batch: none
        return None
    if whole.shape == part.shape:
        return "same" if close(whole.values, part.values, whole.tolerance) else None
    for at in (0, 1):
        if not _differ_at(at, whole.shape, part.shape) or at >= whole.values.dim():
            continue
        tokens = whole.shape[at] // rows
        together = tokens == 1 or at == 0 or whole.shape[0] == 1
        if whole.shape[at] % rows or part.shape[at] != len(index) * tokens or not together:
            return None
        theirs = whole.values.unflatten(at, (rows, tokens))
        theirs = theirs.index_select(at, torch.tensor(index, device=theirs.device))
        theirs = theirs.flatten(at, at + 1)
        if not close(theirs, part.values, whole.tolerance):
            return None
        return tokens if tokens > 1 else "second" if at else "rows"
    return None


def _layout_of_one(whole: Digest) -> Layout:
    """The layout of a single row's input: its tokens (T, ..., D) or (T,), or the row itself."""
    return whole.shape[0] if len(whole.shape) and whole.shape[0] != 1 else "rows"
