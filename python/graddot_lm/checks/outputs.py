"""Whether what a model returns is what its scored layers and its rows make of it."""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import GraddotError
from ..rules.mixtures import ROUTED
from ..step import Step
from .digests import (
    Digest,
    Held,
    NoDropout,
    close,
    counts_of,
    digest,
    hold,
    kept_values,
    must_run,
    numbers_of,
    own_buffers,
    own_inputs,
    own_random,
)
from .parts import Entries, Numbers, filled_up, splits_of, take_inputs
from .verify import changed_by_validation, placed_tensors, tensors_in


@contextlib.contextmanager
def _no_autocast(kind: str) -> Iterator[None]:
    """Inside of it none is turned on either, as the model's forward that accelerate wrapped does."""
    with torch.autocast(kind, enabled=False), contextlib.ExitStack() as restored:
        for name in ("__enter__", "__exit__"):
            restored.callback(setattr, torch.autocast, name, getattr(torch.autocast, name))
            setattr(torch.autocast, name, lambda self, *error: None)
        yield


def check_outputs(
    plain: Callable[[], Any],
    scored: Callable[..., Any],
    step: Step,
    agreed: Callable[[bool], bool] = bool,
    of_half: Callable[[], Any] | None = None,
) -> None:
    """Raise GraddotError if a model with its layers scored does not return what it did before.

    Where a layer's input has no rows its output gets them, (rows, ...) in place of (1, ...), or of
    (T, ...), which code that does more than to broadcast it takes for something else. On the device
    of the step, a trial, autocast is off, if the model runs so: rounded to 16 bits, tokens go to other
    experts. agreed as in `find_layouts`; of_half() runs the model as it was on half of the rows.
    """
    kind, rounded = step.scale.device.type, False

    def outputs(run: Callable[[], Any], seed: int) -> list[Digest]:
        torch.manual_seed(seed)
        found = [digest(x) for x in tensors_in(run())]
        for x in found if rounded else []:
            x.tolerance = max(x.tolerance, 0.1)
        return found

    def not_of_rows() -> set[int]:
        """The outputs that are with half of the rows as long as with all, or, in a list, not there."""
        assert of_half is not None
        half = {place: x.shape for place, x in placed_tensors(of_half())}
        whole = enumerate(placed_tensors(plain()))
        return {i for i, (place, x) in whole if half.get(place, x.shape) == x.shape}

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(own_random())
        stack.enter_context(NoDropout())
        try:
            with _no_autocast(kind):
                want = outputs(plain, 0)
            stack.enter_context(_no_autocast(kind))
        except Exception:  # noqa: BLE001 - the model's own code may raise anything
            rounded = True  # by an autocast of its own, as Fabric's, whatever dtype it returns
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
        same = _same(got, want)
        # Random by itself: not judged.
        noise = agreed(not same) and not _same(outputs(plain, 1), want)
        flat = {
            n for n, layout in step.layouts.items() if isinstance(layout, int) or layout == ROUTED
        }
        layers = sorted(flat | step.expands) if same and step.rows > 1 else []
        if agreed(bool(layers)):
            moved = lambda *where: outputs(lambda: scored(where), 0)
            _check_kept_apart(moved, got, step, layers, of_half and not_of_rows)
        if same or noise:
            return
    raise GraddotError(f"the model's outputs change when its layers are scored. {_EXPANDED}")


def _check_kept_apart(
    run: Callable[[slice, Collection[str]], list[Digest]],
    still: list[Digest],
    step: Step,
    layers: list[str],
    not_of_rows: Callable[[], set[int]] | None,
) -> None:
    """Raise GraddotError if what one of the layers returns for a sample reaches another sample's output.

    So it does where layers return copies for every row, and the model takes a mean over all of them,
    which is the same as without copies, but its gradient is not; and where a flat layer's input is the
    same for all rows and tokens, so that their order was misread. run(rows, layers) gives the outputs
    with what these layers return for these rows moved. An output of other rows must stay; a loss
    alone must change by as much with all rows as with one half and with the other. What is as long as
    the rows by chance, as the features of an image of so many tokens, is as long with half of them.
    """
    rows, half, others = step.rows, step.rows // 2, set[int]()

    def apart(layers: Collection[str]) -> bool:
        first = run(slice(half), layers)
        if len(still) == 1 and not still[0].shape:
            losses = [still, first, run(slice(half, rows), layers), run(slice(rows), layers)]
            before, *after = (of[0].values.double() for of in losses)
            one, other, both = (x - before for x in after)
            rounding = 64 * torch.finfo(still[0].values.dtype).eps * before.abs()
            error = (one + other - both).abs()
            return not bool(error > rounding + 1e-3 * (one.abs() + other.abs()))
        pairs = enumerate(zip(still, first, strict=False))
        return all(i in others or stays(x, y) for i, (x, y) in pairs)

    def stays(x: Digest, y: Digest) -> bool:
        # Of rows of the same batch, for which rounding does less.
        tolerance = {1e-5: 1e-8, 1e-2: 1e-5}.get(x.tolerance, 1e-2)
        later = lambda d, k: d.values.narrow(k, half, rows - half)
        at = [k for k in (0, 1) if k < x.values.dim() and x.shape[k] == rows]
        return not at or any(close(later(x, k), later(y, k), tolerance) for k in at)

    try:
        if apart(layers) or not layers:
            return
    except GraddotError:
        raise
    except Exception:  # noqa: BLE001 - the model's own code may refuse what was moved
        return
    if not_of_rows is not None:
        with contextlib.suppress(Exception):  # the model may refuse so few rows
            others |= not_of_rows()
        if apart(layers):
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
    entries: Entries,
) -> None:
    """Raise GraddotError if rows that were filled up at the right change what the model returns.

    filled is which rows of the batch, their own length, and that to which they were filled up.
    """
    index, own, full = filled

    def run(length: int) -> list[Digest]:
        def short(x: Tensor) -> Tensor:
            return x[:, :length].contiguous() if x.dim() > 1 and x.shape[1] == full else x

        few = take_inputs((args, kwargs), index, rows, entries)
        part_args, part_kwargs = tree_map_only(Tensor, short, few)
        with own_buffers(model):
            out = model(*part_args, **part_kwargs)
        cut = lambda x: x[:, :own] if x.dim() > 1 and x.shape[1] == full else x
        return [digest(cut(x)) for x in tensors_in(out) if x.dim() > 0]

    with torch.no_grad(), own_random(), NoDropout():
        got = run(full)
        fails = f"does not run on rows of length {own} before they are filled up to {full}"
        with must_run(fails, "ignore padding"):
            want = run(own)
    pairs = [(x, y) for x, y in zip(got, want, strict=False) if x.shape == y.shape]
    if not all(_same([x], [y]) for x, y in pairs):
        raise GraddotError(
            f"rows of length {own} that were filled up to {full} change what the model returns for"
            " them: it looks at the padding. Give it an attention mask that it heeds, or training and"
            " validation rows of one length"
        )


def check_memory(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    before: Held,
    agreed: Callable[[bool], bool] = bool,
) -> None:
    """Raise GraddotError if tensors or numbers that the forward left in its modules' attributes, or in
    lists and dicts there, change what the model returns the next time. before are `remembered_values`.

    Validation rows then reach training rows in later steps. An attention map that is kept to be looked
    at, or an auxiliary loss, does no harm; nor does a count of forwards.
    """
    now, changed = kept_values(model), []
    earlier = {module: dict(values) for module, values in now.items()}
    for name, module in model.named_modules():
        old = before[module]
        for key, x in now[module].items():
            kept = isinstance(x, (Tensor, float, list, dict))
            if kept and not _same_value(x, old.get(key)):
                changed.append(f"{name}.{key}".lstrip("."))
                earlier[module].pop(key)
                earlier[module].update({key: old[key]} if key in old else {})
    if not agreed(bool(changed)):
        return

    def outputs(held: Held) -> list[Digest]:
        own_args, own_kwargs = own_inputs((args, kwargs))
        torch.manual_seed(0)
        hold(held)
        with own_buffers(model):
            return [digest(x) for x in tensors_in(model(*own_args, **own_kwargs))]

    try:
        with torch.no_grad(), own_random(), NoDropout():
            want, got = outputs(now), outputs(earlier)
            same = _same(got, want)
            noise = agreed(not same) and not _same(outputs(now), want)
            if same or noise:
                return
    finally:
        hold(now)
    raise GraddotError(
        f"{', '.join(changed)}: changed by the forward, in which validation rows ride along with the"
        " training rows, and what the model returns the next time depends on that. Leave val_data out"
        " and give directions (compute_directions), for training rows then run alone"
    )


def check_counts(
    model: nn.Module,
    half: tuple[Any, Any],
    before: Mapping[str, Tensor],
    agreed: Callable[[bool], bool] = bool,
) -> None:
    """Raise GraddotError if buffers of whole numbers, before the forward `before`, were changed by it, and by
    a run on half of the rows, whose inputs these are, in another way: as a count of rows, not of forwards."""
    changes = lambda now, old: {
        k: now[k] - x for k, x in old.items() if k in now and not torch.equal(now[k], x)
    }
    changed = changes(counts_of(model), before)
    if not agreed(bool(changed)):
        return
    with torch.no_grad(), own_random(), NoDropout(), own_buffers(model):
        start, (args, kwargs) = counts_of(model), own_inputs(half)
        model(*args, **kwargs)
        by_half = changes(counts_of(model), start)
    for name, change in changed.items():
        if name not in by_half or not torch.equal(change, by_half[name]):
            raise changed_by_validation(f"buffer {name}", "a count of rows")


def _same_value(x: Any, y: Any) -> bool:
    """Of lists and dicts of their numbers and tensors without a gradient alone, for losses are kept there to
    be added up."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.shape == y.shape and torch.equal(x, y.to(x))
    if type(x) in (list, dict) and type(x) is type(y):
        left, right = (list(enumerate(z) if type(z) is list else z.items()) for z in (x, y))
        kept, before = ([pair for pair in z if _is_kept(pair[1])] for z in (left, right))
        return len(kept) == len(before) and all(
            a == b and _same_value(v, w) for (a, v), (b, w) in zip(kept, before, strict=True)
        )
    return type(x) is type(y) and bool(x == y)


def _is_kept(x: Any) -> bool:
    return isinstance(x, float) or (isinstance(x, Tensor) and not x.requires_grad)


def _same(got: list[Digest], want: list[Digest]) -> bool:
    def alike(x: Digest, y: Digest) -> bool:
        by_dtype = {torch.float64: 1e-6, torch.float32: 1e-3}.get(y.values.dtype, 0.1)
        tolerance = 0.1 if y.tolerance == 0.1 else by_dtype  # 16 bits, whose digests are of fp32
        return x.shape == y.shape and close(x.values, y.values, tolerance)

    return len(got) == len(want) and all(map(alike, got, want))


_EXPANDED = (
    "A layer whose input has no rows, such as position ids of shape (T,), returns (rows, T, ...)"
    " while it is scored; give it ids of shape (1, T), or use its output by broadcasting only"
)


def is_divided(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> bool | None:
    """Whether the loss that a model returns is divided by num_items_in_batch: with twice as many it is
    half as large then, and the same where the model takes the number and ignores it. None where that
    cannot be seen, of a loss of 0 or of no labelled token. Raises GraddotError if it is neither.
    """
    losses: list[Tensor] = []
    with torch.no_grad(), own_random(), NoDropout():
        for times in (1, 2):
            items = times * kwargs["num_items_in_batch"]
            torch.manual_seed(0)
            own_args, own_kwargs = own_inputs((args, {**kwargs, "num_items_in_batch": items}))
            with own_buffers(model):
                out = model(*own_args, **own_kwargs)
            numbers = [x for x in tensors_in(out) if x.dim() == 0]
            losses += [out["loss"]] if isinstance(out, Mapping) and "loss" in out else numbers[:1]
    if not losses or losses[0].dim() > 0:  # the caller's own loss, for which the number is
        return True
    once, twice = (float(loss) for loss in losses)
    if not math.isfinite(once) or once == 0:
        return None
    tolerance = loss_tolerance(model)
    if abs(twice / once - 1) <= tolerance:
        return False
    if abs(twice / once - 0.5) <= tolerance:
        return True
    raise GraddotError(
        f"with num_items_in_batch={float(items) / 2:g} the model's loss is {once:.6g}, and"
        f" {twice:.6g} with twice that, but one that is divided by it would be half as large, and one"
        " that is not the same; leave num_items_in_batch out"
    )


def loss_tolerance(model: nn.Module) -> float:
    """Relative, of two runs of it."""
    p = next(model.parameters())
    rounded = p.element_size() < 4 or torch.is_autocast_enabled(p.device.type)
    return 2e-2 if rounded else 1e-4


def check_losses(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    rows: int,
    weights: Tensor | None,
    take: Callable[[Any, list[int]], Any],
    known: Mapping[tuple[int, ...], Numbers],
    *,
    thorough: bool = True,
    runs: int = 0,
) -> dict[int | str, str]:
    """What is wrong with numbers that the model returns, by their place among its outputs, or keeps in
    attributes, by name: those that are not the losses of its rows, weighted.

    take(inputs, index) gives a model's inputs for some of the rows, which may be samples that share
    one. weights (rows,) are the rows' labelled tokens for a loss that is their mean, None for a sum. An
    auxiliary loss of a mixture of experts, class weights or a comparison of samples make a loss that is
    neither. known are the numbers of some of the rows, on which it is not run again; thorough and runs as in
    `find_layouts`.
    """
    splits = splits_of(rows, thorough)
    parts = filled_up([part for split in splits for part in split], runs)
    losses: list[dict[int | str, Tensor]] = []
    with torch.no_grad(), own_random(), NoDropout():
        for part in [list(range(rows)), *parts]:
            if (found := known.get(tuple(part))) is None:
                part_args, part_kwargs = take((args, kwargs), part)
                with own_buffers(model):
                    found = numbers_of(model, model(*part_args, **part_kwargs))
            numbers, aux_loss = found
            if not numbers:
                return {}
            if aux_loss is not None:
                problem = (
                    f"the loss has an aux_loss ({float(aux_loss):.4g}) over all rows of the"
                    " batch, as that which balances experts, in which no row has a part of its"
                    " own; pass output_router_logits=False, or TRL router_aux_loss_coef=0.0"
                )
                return dict.fromkeys(numbers, problem)
            losses.append(numbers)
    wrong: dict[int | str, str] = {}
    whole, *of_parts = losses
    rough = loss_tolerance(model)
    # What balances experts is all but the same in every part.
    tolerance = {int: rough, str: max(rough / 100, 1e-5)}
    for key, value in whole.items():
        values = [x.get(key, value) for x in of_parts]
        if all(bool(x == value) for x in values):  # no loss of rows, such as a temperature
            continue
        for k, split in enumerate(splits):
            of_split = torch.stack([value, *values[2 * k : 2 * k + 2]])
            what = _problem(key, of_split, split, weights, tolerance[type(key)])
            if what is not None:
                wrong.setdefault(key, what)
    return wrong


def _problem(
    key: int | str,
    losses: Tensor,
    split: tuple[list[int], list[int]],
    weights: Tensor | None,
    tolerance: float,
) -> str | None:
    """Of a loss of all rows and of both parts of them, (3,)."""
    if not losses[0].isfinite():  # which says nothing, and in the first step is refused
        return None
    shares = losses[0].new_ones(2)
    if weights is not None:
        if not weights.any():  # the mean of nothing
            return None
        shares = torch.stack([weights[part].sum() for part in split]).to(losses[0])
        shares = shares / shares.sum()
    # The mean of a part without labels is NaN.
    want = torch.where(shares == 0, 0, shares * losses[1:]).sum()
    if (losses[0] - want).abs() <= tolerance * want.abs():
        return None
    how = "sum" if weights is None else f"mean, weighted {shares.tolist()} by labelled tokens,"
    what, advice = (
        "the model's loss",
        ("pass loss_reduction or label_shift, or a loss of your own to track_loss"),
    )
    if isinstance(key, str):
        what, advice = (
            f"{key}, of which the loss is made,",
            (
                "in one that balances experts over a batch, or compares samples, no row has a part of its"
                " own; leave it out"
            ),
        )
    return (
        f"{what} is {float(losses[0]):.6g}, but those of {len(split[1])} and the"
        f" other {len(split[0])} rows have the {how} {float(want):.6g}. Expected the"
        f" {'sum' if weights is None else 'mean'} over the labelled tokens of all rows: {advice}"
    )
