"""Whether samples are kept apart in the backward as well: what only it does, no forward shows.

An auxiliary loss whose gradient an autograd function adds, as in DeepSeek's own mixtures of experts, or a
hook that normalises gradients over the batch, mixes samples there.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from .digests import NoDropout, digest, forwards_replaced, own_buffers, own_inputs, own_random
from .errors import GraddotError
from .parts import Entries, take_inputs
from .rows import Layout
from .verify import tensors_in

_Gradients = dict[str, list[Tensor | None]]  # by layer, of each call


def check_backward(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    layouts: Mapping[str, Layout],
    args: Any,
    kwargs: Mapping[str, Any],
    rows: int,
    entries: Entries,
) -> None:
    """Raise GraddotError if gradients of the layers' outputs are not those of each sample alone.

    A few of the rows are run with a loss of all of them, and again with one of the first half. Where the
    model returns something by rows, the loss is of that, and the others' gradients must be zero then;
    else it is the model's own, and the half runs by itself. In both the half's gradients must be the
    same, but for the scale of a mean. A model that cannot be differentiated so (behind reentrant
    checkpoints) is not judged.
    """
    index = _some_rows(rows, (args, kwargs))
    half = len(index) // 2
    judged = {name: x for name, x in layers.items() if layouts.get(name) in ("rows", "second")}

    def run(taken: list[int], use: Callable[[Any], Any]) -> Any:
        few = take_inputs((args, kwargs), taken, rows, entries)
        few_args, few_kwargs = own_inputs(tree_map_only(Tensor, Tensor.detach, few))
        torch.manual_seed(0)
        with own_buffers(model):
            return use(lambda: list(tensors_in(model(*few_args, **few_kwargs))))

    def gradients(taken: list[int], kept: int, alone: list[int | None]) -> tuple[_Gradients, bool]:
        return run(taken, lambda forward: _gradients(forward, judged, len(taken), kept, alone))  # type: ignore[no-any-return]

    try:
        # A checkpoint around the model, or what counts its memory, sees nothing of this.
        unseen = saved_tensors_hooks(Tensor.detach, lambda x: x)
        with torch.enable_grad(), own_random(), NoDropout(), unseen:
            alone = run(index[:half], lambda forward: _lengths(forward()))
            whole, by_rows = gradients(index, len(index), alone)
            own = (index, half, alone) if by_rows else (index[:half], half, [])
            part, _ = gradients(*own)
    except GraddotError:
        raise
    except Exception:  # noqa: BLE001 - the model's own code may raise anything
        return
    few_rows = len(index) if by_rows else half
    pairs = [
        (name, _by_row(x, layouts[name], len(index)), _by_row(y, layouts[name], few_rows))
        for name in whole
        for x, y in zip(whole[name], part.get(name, []), strict=False)
        if x is not None and y is not None
    ]
    pairs = [(name, x, y) for name, x, y in pairs if x.numel() and x.shape[1:] == y.shape[1:]]
    scale = 1.0 if by_rows else _scale(pairs, half)
    largest = max((x[:half].double().norm() for _, x, _ in pairs), default=torch.zeros(()))
    rounded = any(torch.is_autocast_enabled(x.device.type) or x.itemsize < 4 for _, x, _ in pairs)
    for name, x, y in pairs:
        tolerance = 0.1 if rounded else 1e-3 if x.dtype == torch.float32 else 1e-6
        x, y = x.double(), y.double()
        size = y[:half].norm()
        if not bool(torch.isfinite(torch.stack([x.norm(), size, y.norm()])).all()):
            continue
        leaked = y[half:].norm() > 1e-6 * size
        # A gradient may be zero but for rounding: that of what moves all inputs of a softmax alike.
        floor = torch.maximum(x[:half].norm(), 1e-3 * largest)
        changed = (x[:half] - scale * y[:half]).norm() > tolerance * floor
        if leaked or changed:
            raise GraddotError(
                f"in the backward, the gradient of what layer {name} returns for a sample depends on"
                " other samples, though its value does not: a hook or an autograd function behind it"
                " mixes them, as one that adds the gradient of an auxiliary loss (turn that off) or"
                " that normalises gradients over the batch"
            )


def _some_rows(rows: int, arguments: Any) -> list[int]:
    """A few rows from everywhere, as many as no tensor has tokens."""
    sizes = {s for x in tree_leaves(arguments) if isinstance(x, Tensor) for s in x.shape[1:]}
    count = next((n for n in (4, 3, 2) if n <= rows and n not in sizes), min(rows, 2))
    return [round(i * (rows - 1) / (count - 1)) for i in range(count)]


def _gradients(
    forward: Callable[[], list[Tensor]],
    layers: Mapping[str, nn.Module],
    rows: int,
    kept: int,
    alone: list[int | None],
) -> tuple[_Gradients, bool]:
    """The gradients of every layer's outputs for a loss of the first `kept` rows of what the model
    returns by rows, and True; or else for its own loss, and False. alone are the outputs' lengths in
    a run of half of the rows."""
    found: dict[str, list[Tensor]] = {}

    def seen(name: str, forward: Any) -> Any:
        @functools.wraps(forward)
        def see(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            first = next(iter(tensors_in(out)), None)
            if first is not None and first.requires_grad:
                found.setdefault(name, []).append(first)
            return out

        return see

    with forwards_replaced(layers, seen):
        out = forward()
    by_rows = [
        x for x, *of in zip(out, _lengths(out), alone, strict=False) if of == [rows, rows // 2]
    ]
    losses = [digest(x[:kept]).values.sum() for x in by_rows]
    losses = losses or [x for x in out if x.dim() == 0 and x.requires_grad][:1]
    outputs = [x for of in found.values() for x in of]
    if not losses or not outputs:
        return {}, bool(by_rows)
    loss = torch.stack([x.double() for x in losses]).sum()
    grads = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
    return {name: [next(grads) for _ in of] for name, of in found.items()}, bool(by_rows)


def _lengths(outputs: list[Tensor]) -> list[int | None]:
    """Of those that have a gradient."""
    return [len(x) if x.requires_grad and x.dim() else None for x in outputs]


def _by_row(grad: Tensor, layout: Layout, rows: int) -> Tensor:
    """(rows, ...); empty where the output, unlike the input, has no rows there."""
    at = int(layout == "second")
    has_rows = grad.dim() > at and grad.shape[at] == rows
    return grad.movedim(at, 0) if has_rows else grad.new_empty(0)


def _scale(pairs: list[tuple[str, Tensor, Tensor]], half: int) -> float:
    """Of a mean over fewer tokens to that over all, as the gradients have it."""
    halves = [(x[:half].double(), y[:half].double()) for _, x, y in pairs]
    both = sum(float((x * y).sum()) for x, y in halves)
    own = sum(float(y.square().sum()) for _, y in halves)
    return both / own if own else 1.0
