"""How the samples lie in every layer's input, seen by leaving half of them out.

Before the first step the model runs twice without gradients, on all rows and on the later half. A
layer whose input is that of its rows alone is safe; one whose input changed when other samples were
left out gets mixed samples and is refused. The same two runs tell whether a layer's input has the
rows as its first dimension, one after the other in it (rows·T, D), or not at all (position ids).
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .errors import GraddotError
from .layers import Step
from .recurrent import KERNELS
from .scored import first_tensor
from .verify import tensors_in

_DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.alpha_dropout, torch.feature_dropout,
}  # fmt: skip


# What is drawn in place of random numbers. Uniform ones are compared with a rate, by layers of random
# depth: what keeps a layer.
_DRAWN = {
    torch.rand: 1 - 2**-7, torch.rand_like: 1 - 2**-7, Tensor.uniform_: 1 - 2**-7,
    torch.randn: 0.5, torch.randn_like: 0.5, torch.normal: 0.5, Tensor.normal_: 0.5,
    torch.bernoulli: 1, Tensor.bernoulli_: 1, Tensor.exponential_: 1,
}  # fmt: skip


class NoDropout(TorchFunctionMode):
    """Dropout does nothing, whatever the mode of the module that calls it, and noise is the same for
    every row and in every run, so that layers behind it can be compared."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if func is torch.randn and kwargs.get("generator") is not None:  # our own numbers
            return func(*args, **kwargs)
        if func in _DRAWN:
            return func(*args, **kwargs).fill_(_DRAWN[func])
        if func is torch.randperm:  # every row gets another
            return func(*args, **kwargs).sort().values.roll(1)
        if func is torch.randint:
            ints = [x for x in args[:2] if isinstance(x, int)]
            low = ints[0] if len(ints) == 2 else kwargs.get("low", 0)
            return func(*args, **kwargs).fill_(low)
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs.pop("dropout_p", None)
        if func in KERNELS.values() and isinstance(args[3], bool):  # of no PackedSequence
            args = (*args[:5], 0.0, *args[6:])
        if func is F.multi_head_attention_forward:
            args = (*args[:10], 0.0, *args[11:])
        return func(*args, **kwargs)


# "rows" (rows, ..., D); "second" (T, rows, ..., D); "same" for every row; T where a row's T tokens
# lie together, (rows·T, ..., D); "unseen" where noise kept a layer from being judged.
Layout = str | int
_OUTPUTS = " outputs"  # beside the layers' names


def take_rows(x: Tensor, index: list[int], rows: int, tokens: int = 0) -> Tensor:
    """Some of the samples of (rows, ...) or (rows·tokens, ...); a tensor without samples itself."""
    if x.dim() > 0 and x.shape[0] == rows:
        return x[index]
    if tokens and x.dim() > 0 and x.shape[0] == rows * tokens:
        return x.unflatten(0, (rows, tokens))[index].flatten(0, 1)
    return x


# By id of a tensor among a model's inputs that holds several entries of every row, one row's after the
# other's: how many each row has.
Packed = Mapping[int, Sequence[int]]


def packed_inputs(kwargs: Mapping[str, Any], rows: int) -> Packed:
    """The patches of images, of which every row has one: as many as its entry in a grid says, as
    vision-language models of transformers have it."""
    found = {}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        grid, patches = kwargs.get(f"{kind}_grid_thw"), kwargs.get(name)
        if isinstance(grid, Tensor) and isinstance(patches, Tensor) and grid.shape == (rows, 3):
            counts = grid.prod(1).tolist()
            if sum(counts) == len(patches) != rows:
                found[id(patches)] = counts
    return found


def take_inputs(arguments: Any, index: list[int], rows: int, packed: Packed) -> Any:
    """`take_rows` of all tensors among a model's inputs."""

    def one(x: Tensor) -> Tensor:
        if id(x) not in packed:
            return take_rows(x, index, rows)
        parts = x.split(list(packed[id(x)]))
        return torch.cat([parts[i] for i in index])

    return tree_map_only(Tensor, one, arguments)


def _split(rows: int, packed: Packed) -> int:
    """How many of the first rows are left out to see how layers hold the rows: half of them, or where
    they have more or fewer patches than as many others, lest a layer of patches seem to have equally
    many of each row."""
    for counts in packed.values():
        before = 0
        for k, count in enumerate(counts):
            if before * rows != k * sum(counts):
                return k
            before += count
    return rows // 2


@dataclass
class _Digest:
    """An input's shape, and one random projection of every vector in it."""

    shape: torch.Size
    values: Tensor
    tolerance: float = 0.0  # for what rounding makes of the same rows in a smaller batch
    caller: str | None = None  # the innermost of the layers around whose forward is followed


class KnownLayouts:
    """The layouts found so far, by mode of the model: for all inputs, or, where layers see tokens
    without their rows, for inputs of the same shapes only. A mode is anything hashable."""

    def __init__(self) -> None:
        self._found: dict[Any, dict[str, Layout]] = {}
        self._asked: set[Any] = set()

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

    def is_new(self, mode: Any, shape: torch.Size) -> bool:
        """Whether labels of this shape may come with inputs of unknown layouts: asked before for
        other shapes only."""
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
    packed: Packed | None = None,
) -> dict[str, Layout]:
    """By layer name, how its input holds the samples; on_layer may refuse a layer before it runs.
    followed are those of the layers whose forward is followed (following.py).

    A layer whose input is random in a way of its own cannot be judged: "unseen". In a batch of one
    row all is that row's; this says nothing about larger batches.

    Raises GraddotError for a layer whose input depends on other samples of the batch, or holds
    them in no such way (tokens picked out of the batch, say), and for a model whose outputs do.
    """
    if rows < 2:
        with torch.no_grad(), torch.random.fork_rng(), NoDropout():
            alone = _digests(model, layers, args, kwargs, on_layer)
        of_one = {name: {_layout_of_one(digest) for digest in alone[name]} for name in alone}
        return {
            name: layouts.pop() if len(layouts) == 1 else "unseen"
            for name, layouts in of_one.items()
            if name != _OUTPUTS
        }
    packed = packed or {}
    later = list(range(_split(rows, packed), rows))
    few_args, few_kwargs = take_inputs((args, kwargs), later, rows, packed)
    with torch.no_grad(), torch.random.fork_rng(), NoDropout():
        whole = _digests(model, layers, args, kwargs, on_layer, followed)
        try:
            part = _digests(model, layers, few_args, few_kwargs)
        except Exception as error:  # the model's own code may raise anything
            raise GraddotError(
                f"the model runs on the joint batch of {rows} rows, but not on {len(later)} of them"
                f" ({type(error).__name__}: {error}), so that it cannot be shown to keep samples"
                " apart"
            ) from error
        with_rows = _with_rows(whole[_OUTPUTS], part[_OUTPUTS], rows, len(later))
        for digests in (whole, part):
            digests[_OUTPUTS] = [digests[_OUTPUTS][i] for i in with_rows]
        found = {
            name: _layout(name, whole[name], part.get(name, []), rows, len(later)) for name in whole
        }
        if None in found.values():  # noise of the model's own, or mixed samples?
            torch.seed()
            again = _digests(model, layers, args, kwargs)
            again[_OUTPUTS] = [again[_OUTPUTS][i] for i in with_rows]
            for name, layout in found.items():
                if layout is None and _equal(whole[name], again.get(name, [])):
                    raise GraddotError(_mixed(name, whole[name][0].shape, rows, later[0]))
        # Picked tokens have lost a dimension: (rows·T, D), or (rows, D) if there is one a row.
        flat = {
            name: whole[name]
            for name, layout in found.items()
            if name != _OUTPUTS
            and (isinstance(layout, int) or layout == "rows" and _is_flat(whole[name]))
        }
        if flat:
            _check_not_picked(model, layers, args, kwargs, rows, flat)
    return {name: layout or "unseen" for name, layout in found.items() if name != _OUTPUTS}


def _check_not_picked(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    args: Any,
    kwargs: Any,
    rows: int,
    flat: Mapping[str, list[_Digest]],
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

    def seen(only: Tensor | None) -> dict[str, list[_Digest]] | None:
        changed = tree_map_only(Tensor, functools.partial(alike, only), (args, kwargs))
        try:
            return _digests(model, layers, *changed)
        except Exception:  # noqa: BLE001 - the model's own code may refuse such rows
            return None

    runs = [seen(None)]
    if runs == [None]:  # an image has its tokens; but a mask may be another
        runs = [seen(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    for found, (name, calls) in itertools.product(filter(None, runs), flat.items()):
        pairs = list(zip(found.get(name, []), calls, strict=False))
        if any(x.shape[:1] != y.shape[:1] and len(x.shape) == len(y.shape) for x, y in pairs):
            raise GraddotError(
                f"layer {name} gets tokens that are picked by their values (of shape"
                f" {tuple(calls[0].shape)} in this batch), of which it is not known which row each"
                " belongs to; run it on all tokens, and let the loss ignore the others"
            )


def _is_flat(calls: list[_Digest]) -> bool:
    """Whether a layer with the rows as its input's first dimension gets one vector, or id, a row."""
    return any(len(x.shape) == (2 if x.values.is_floating_point() else 1) for x in calls)


@contextlib.contextmanager
def own_buffers(model: nn.Module) -> Iterator[None]:
    """Inside of it the model has copies of its buffers: what a forward adds to a running mean or a
    counter is gone afterwards."""
    kept = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    copies: dict[int, Tensor] = {}
    for module, buffers in kept:
        for name, x in buffers.items():
            if x is not None:
                module._buffers[name] = copies.setdefault(id(x), x.detach().clone())
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.clear()
            module._buffers.update(buffers)


def own_inputs(arguments: Any) -> Any:
    """A call's arguments with copies of their tensors, for a model may write to its input."""
    copies: dict[int, Tensor] = {}
    one = lambda x: copies[id(x)] if id(x) in copies else copies.setdefault(id(x), x.clone())
    return tree_map_only(Tensor, one, arguments)


@contextlib.contextmanager
def _no_autocast(kind: str) -> Iterator[None]:
    """Inside of it none is turned on either, as the model's forward that accelerate wrapped does."""
    with torch.autocast(kind, enabled=False), contextlib.ExitStack() as restored:
        for name in ("__enter__", "__exit__"):
            restored.callback(setattr, torch.autocast, name, getattr(torch.autocast, name))
            setattr(torch.autocast, name, lambda self, *error: None)
        yield


def check_outputs(plain: Callable[[], Any], scored: Callable[..., Any], step: Step) -> None:
    """Raise GraddotError if a model with its layers scored does not return what it did before.

    Where a layer's input has no rows its output gets them, (rows, ...) in place of (1, ...), or of
    (T, ...), which code that does more than to broadcast it takes for something else. On the device
    of the step, a trial, autocast is off, if the model runs so: rounded to 16 bits, tokens go to other
    experts.
    """
    kind = step.scale.device.type

    def outputs(run: Callable[[], Any], seed: int) -> list[_Digest]:
        torch.manual_seed(seed)
        return [_digest(x) for x in tensors_in(run())]

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(NoDropout())
        try:
            with _no_autocast(kind):
                want = outputs(plain, 0)
            stack.enter_context(_no_autocast(kind))
        except Exception:  # noqa: BLE001 - the model's own code may raise anything
            want = outputs(plain, 0)
        try:
            got = outputs(scored, 0)
        except GraddotError:
            raise
        except Exception as error:  # the model's own code may raise anything
            raise GraddotError(
                "the model does not run with its layers scored"
                f" ({type(error).__name__}: {error}). {_EXPANDED}"
            ) from error
        if _same(got, want):
            if step.rows > 1:
                moved = lambda *where: outputs(lambda: scored(where), 0)
                _check_kept_apart(moved, got, step)
            return
        if not _same(outputs(plain, 1), want):  # random by itself: not judged
            return
    raise GraddotError(f"the model's outputs change when its layers are scored. {_EXPANDED}")


def _check_kept_apart(
    run: Callable[[slice, Collection[str]], list[_Digest]], still: list[_Digest], step: Step
) -> None:
    """Raise GraddotError if what a layer returns for a sample reaches another sample's output.

    So it does where layers return copies for every row, and the model takes a mean over all of them,
    which is the same as without copies, but its gradient is not; and where a flat layer's input is the
    same for all rows and tokens, so that their order was misread. run(rows, layers) gives the outputs
    with what these layers return for these rows moved. An output of other rows must stay; a loss
    alone must change by as much with all rows as with one half and with the other.
    """
    rows, half = step.rows, step.rows // 2

    def apart(layers: Collection[str]) -> bool:
        first = run(slice(half), layers)
        if len(still) == 1 and not still[0].shape:
            losses = [still, first, run(slice(half, rows), layers), run(slice(rows), layers)]
            before, *after = (of[0].values.double() for of in losses)
            one, other, both = (x - before for x in after)
            rounding = 64 * torch.finfo(still[0].values.dtype).eps * before.abs()
            error = (one + other - both).abs()
            return not bool(error > rounding + 1e-3 * (one.abs() + other.abs()))
        return all(map(stays, still, first))

    def stays(x: _Digest, y: _Digest) -> bool:
        # Of rows of the same batch, for which rounding does less.
        tolerance = {1e-5: 1e-8, 1e-2: 1e-5}.get(x.tolerance, 1e-2)
        later = lambda d, k: d.values.narrow(k, half, rows - half)
        at = [k for k in (0, 1) if k < x.values.dim() and x.shape[k] == rows]
        return not at or any(_close(later(x, k), later(y, k), tolerance) for k in at)

    flat = {name for name, layout in step.layouts.items() if isinstance(layout, int)}
    layers = sorted(flat | step.expands)
    try:
        if not layers or apart(layers):
            return
    except GraddotError:
        raise
    except Exception:  # noqa: BLE001 - the model's own code may refuse what was moved
        return
    while len(layers) > 1:
        begin, end = layers[: len(layers) // 2], layers[len(layers) // 2 :]
        layers = end if apart(begin) else begin
    raise GraddotError(
        f"what layer {layers[0]} returns for a sample reaches what the model returns for others"
        + (
            ": it returns the same for all rows, of which every row gets a copy, and samples look at"
            " other samples' copies, as in a mean over all or in the first of them; use it by"
            " broadcasting only"
            if layers[0] in step.expands
            else f", or it does not hold the {rows} rows of the batch one after the other"
        )
    )


def check_padding(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    rows: int,
    filled: tuple[list[int], int, int],
    packed: Packed,
) -> None:
    """Raise GraddotError if rows that were filled up at the right change what the model returns.

    filled is which rows of the batch, their own length, and that to which they were filled up.
    """
    index, own, full = filled

    def run(length: int) -> list[_Digest]:
        def short(x: Tensor) -> Tensor:
            return x[:, :length].contiguous() if x.dim() > 1 and x.shape[1] == full else x

        few = take_inputs((args, kwargs), index, rows, packed)
        part_args, part_kwargs = tree_map_only(Tensor, short, few)
        with own_buffers(model):
            out = model(*part_args, **part_kwargs)
        cut = lambda x: x[:, :own] if x.dim() > 1 and x.shape[1] == full else x
        return [_digest(cut(x)) for x in tensors_in(out) if x.dim() > 0]

    with torch.no_grad(), torch.random.fork_rng(), NoDropout():
        got = run(full)
        try:
            want = run(own)
        except Exception as error:  # the model's own code may raise anything
            raise GraddotError(
                f"the model does not run on rows of length {own} before they are filled up to {full}"
                f" ({type(error).__name__}: {error}), so that it cannot be shown to ignore padding"
            ) from error
    pairs = [(x, y) for x, y in zip(got, want, strict=False) if x.shape == y.shape]
    if not all(_same([x], [y]) for x, y in pairs):
        raise GraddotError(
            f"rows of length {own} that were filled up to {full} change what the model returns for"
            " them: it looks at the padding. Give it an attention mask that it heeds, or training and"
            " validation rows of one length"
        )


def _same(got: list[_Digest], want: list[_Digest]) -> bool:
    def close(x: _Digest, y: _Digest) -> bool:
        by_dtype = {torch.float64: 1e-6, torch.float32: 1e-3}.get(y.values.dtype, 0.1)
        tolerance = 0.1 if y.tolerance == 0.1 else by_dtype  # 16 bits, whose digests are of fp32
        return x.shape == y.shape and _close(x.values, y.values, tolerance)

    return len(got) == len(want) and all(map(close, got, want))


_EXPANDED = (
    "A layer whose input has no rows, such as position ids of shape (T,), returns (rows, T, ...)"
    " while it is scored; give it ids of shape (1, T), or use its output by broadcasting only"
)


def check_loss(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    rows: int,
    weights: Tensor | None,
    numbers: list[int],
    packed: Packed,
) -> None:
    """Raise GraddotError if a loss that the model returns is not that of its rows, weighted.

    numbers says which of the model's outputs are losses. weights (rows,) are the rows' labelled
    tokens for a loss that is their mean, None for a sum. An auxiliary loss of a mixture of experts,
    class weights or a comparison of samples make a loss that is neither.
    """
    p = next(model.parameters())
    rounded = p.element_size() < 4 or torch.is_autocast_enabled(p.device.type)
    tolerance = 2e-2 if rounded else 1e-4
    half = rows // 2
    parts = [list(range(rows)), list(range(half)), list(range(half, rows))]
    losses = []
    with torch.no_grad(), torch.random.fork_rng(), NoDropout():
        for part in parts[: 1 if rows == 1 else 3]:
            part_args, part_kwargs = take_inputs((args, kwargs), part, rows, packed)
            with own_buffers(model):
                out = model(*part_args, **part_kwargs)
            if isinstance(out, Mapping) and out.get("aux_loss") is not None:
                raise GraddotError(
                    f"the loss has an aux_loss ({float(out['aux_loss']):.4g}) over all rows of the"
                    " batch, as that which balances experts, in which no row has a part of its"
                    " own; pass output_router_logits=False"
                )
            found = list(tensors_in(out))
            losses.append([found[k].double() for k in numbers])
    if rows > 1:
        for of_one in zip(*losses, strict=True):
            _check_number(torch.stack(of_one), rows, weights, tolerance)


def _check_number(losses: Tensor, rows: int, weights: Tensor | None, tolerance: float) -> None:
    """Of a loss of all rows, of the first half and of the others, (3,)."""
    if (losses == losses[0]).all():  # no loss of rows, such as a temperature
        return
    half = rows // 2
    shares = losses[0].new_ones(2)
    if weights is not None:
        if not weights.any():  # the mean of nothing
            return
        shares = torch.stack([weights[:half].sum(), weights[half:].sum()]).to(losses[0])
        shares = shares / shares.sum()
    # The mean of a half without labels is NaN.
    want = torch.where(shares == 0, 0, shares * losses[1:]).sum()
    if not (losses[0] - want).abs() <= tolerance * want.abs():
        how = "sum" if weights is None else f"mean, weighted {shares.tolist()} by labelled tokens,"
        raise GraddotError(
            f"the model's loss is {float(losses[0]):.6g}, but those of the first {half} and the"
            f" other {rows - half} rows have the {how} {float(want):.6g}. Expected the"
            f" {'sum' if weights is None else 'mean'} over the labelled tokens of all rows: pass"
            " loss_reduction or label_shift, or a loss of your own to track_loss"
        )


def _mixed(name: str, shape: torch.Size, rows: int, left_out: int) -> str:
    what = "the model has an output" if name == _OUTPUTS else f"layer {name} gets an input"
    return (
        f"{what} (of shape {tuple(shape)}) that depends on other samples of the batch of {rows}"
        " rows, or that does not hold them one after the other: when the first"
        f" {left_out} rows were left out, the others' part changed"
    )


def _with_rows(whole: list[_Digest], part: list[_Digest], rows: int, later: int) -> list[int]:
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


def _digests(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    args: Any,
    kwargs: Any,
    on_layer: Callable[[nn.Module, str], None] = lambda module, name: None,
    followed: Collection[str] = (),
) -> dict[str, list[_Digest]]:
    """Digests of every call's first tensor by layer name, and of the outputs."""
    found: dict[str, list[_Digest]] = {}
    within: list[str] = []

    def seen(name: str, module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        @functools.wraps(forward)
        def see(*args: Any, **kwargs: Any) -> Any:
            on_layer(module, name)
            x = first_tensor((args, kwargs))
            # A layer without an input gives the same for every row.
            digest = _digest(torch.zeros(1) if x is None else x)
            found.setdefault(name, []).append(
                dataclasses.replace(digest, caller=within[-1] if within else None)
            )
            if name not in followed:
                return forward(*args, **kwargs)
            within.append(name)
            try:
                return forward(*args, **kwargs)
            finally:
                within.pop()

        return see

    # In the forwards' place, for they may be called directly, where no hook would see it.
    before = [(module, module.__dict__.get("forward")) for module in layers.values()]
    args, kwargs = own_inputs((args, kwargs))
    try:
        for name, module in layers.items():
            module.forward = seen(name, module)  # type: ignore[method-assign]
        with own_buffers(model):
            out = model(*args, **kwargs)
    finally:
        for module, kept in before:
            module.__dict__.pop("forward", None)
            if kept is not None:
                module.__dict__["forward"] = kept
    found[_OUTPUTS] = [_digest(x) for x in tensors_in(out) if x.dim() > 0]
    return found


def _digest(x: Tensor) -> _Digest:
    if x.dim() == 0 or not x.is_floating_point():
        return _Digest(x.shape, x.detach().clone())
    tolerance = {torch.float64: 1e-5, torch.float32: 1e-2}.get(x.dtype, 0.1)
    if torch.is_autocast_enabled(x.device.type):
        tolerance = 0.1
    generator = torch.Generator().manual_seed(x.shape[-1])
    direction = torch.randn(x.shape[-1], generator=generator).to(x.device)
    wide = x if x.dtype == torch.float64 else x.float()
    values = (wide * direction).sum(-1) if x.dim() > 1 else wide.clone()
    return _Digest(x.shape, values, tolerance)


def _layout(
    name: str, whole: list[_Digest], part: list[_Digest], rows: int, later: int
) -> Layout | None:
    """The layout that a layer's calls share; None if a call has none."""
    if len(whole) != len(part):
        return None
    calls = [(x, _layout_of_call(x, y, rows, later)) for x, y in zip(whole, part, strict=True)]
    layouts = {layout for _, layout in calls}
    if len(layouts) > 1:
        is_beside = lambda x, layout: layout == "same" and x.caller is not None
        layouts = {layout for x, layout in calls if not is_beside(x, layout)}
        _check_beside(name, [x for x, layout in calls if is_beside(x, layout)], layouts, rows)
    if name != _OUTPUTS and None not in layouts and len(layouts) > 1:
        shapes = ", ".join(str(tuple(digest.shape)) for digest in whole)
        raise GraddotError(
            f"layer {name} is called several times, and its inputs (of shapes {shapes}) hold the"
            f" {rows} rows of the batch in different ways; use one layer a way"
        )
    return None if None in layouts else layouts.pop() if layouts else "rows"


def _check_beside(
    name: str, calls: list[_Digest], layouts: Collection[Layout | None], rows: int
) -> None:
    """Calls with inputs that have no rows, by layers that are followed: which know it, and do not
    have the layer scored there. Of a layer that is not inside of theirs that is not proven.

    Raises GraddotError where such an input might then be taken for one of the layouts.
    """
    sizes = {rows * layout if isinstance(layout, int) else rows for layout in layouts}
    at = 1 if "second" in layouts else 0
    for x in calls:
        inside = x.caller == "" or name.startswith(f"{x.caller}.")
        if not inside and sizes & set(x.shape[at : at + 1]):
            raise GraddotError(
                f"layer {name} is called with an input of shape {tuple(x.shape)} that has no rows, by"
                f" layer {x.caller}, in a batch of {rows} rows, in which it might be taken for them;"
                " use another number of rows"
            )


def _layout_of_call(whole: _Digest, part: _Digest, rows: int, later: int) -> Layout | None:
    if not whole.shape.numel() or not part.shape.numel():  # tokens picked from the batch: none
        return None
    if whole.shape == part.shape:
        return "same" if _close(whole.values, part.values, whole.tolerance) else None
    for at in (0, 1):
        if not _differ_at(at, whole.shape, part.shape) or at >= whole.values.dim():
            continue
        tokens = whole.shape[at] // rows
        kept = later * tokens
        if whole.shape[at] % rows or part.shape[at] != kept or (at and tokens > 1):
            return None
        theirs = whole.values.narrow(at, whole.shape[at] - kept, kept)
        if not _close(theirs, part.values, whole.tolerance):
            return None
        return "second" if at else "rows" if tokens == 1 else tokens
    return None


def _layout_of_one(whole: _Digest) -> Layout:
    """The layout of a single row's input: its tokens (T, ..., D) or (T,), or the row itself."""
    return whole.shape[0] if len(whole.shape) and whole.shape[0] != 1 else "rows"


def _equal(a: list[_Digest], b: list[_Digest]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and _close(x.values, y.values, x.tolerance)
        for x, y in zip(a, b, strict=True)
    )


def _close(values: Tensor, part: Tensor, tolerance: float) -> bool:
    if not values.is_floating_point():
        return torch.equal(values, part)
    return bool((values - part).norm() <= tolerance * values.norm())
