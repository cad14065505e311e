"""Whether samples are kept apart in the backward as well: what only it does, no forward shows.

An auxiliary loss whose gradient an autograd function adds, as in DeepSeek's own mixtures of experts, or a
hook that normalises gradients over the batch, mixes samples there.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .digests import NoDropout, digest, forwards_replaced, own_buffers, own_inputs, own_random
from .errors import GraddotError
from .parts import Packed, take_inputs
from .rows import Layout
from .verify import tensors_in


def check_backward(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    layouts: Mapping[str, Layout],
    args: Any,
    kwargs: Mapping[str, Any],
    rows: int,
    packed: Packed,
    ignore_index: int,
) -> None:
    """Raise GraddotError if gradients of the layers' outputs are not those of each sample alone.

    A few of the rows are run twice, with a loss of all of them and with one of the first half: the
    others' gradients must be zero then, and the first half's the same. The loss is of what the model
    returns by rows, or its own with labels left out. A model for which there is neither, or that
    cannot be differentiated so (reentrant checkpoints), is not judged.
    """
    index = _some_rows(rows, (args, kwargs))
    half = len(index) // 2
    few = take_inputs((args, kwargs), index, rows, packed)
    few = tree_map_only(Tensor, Tensor.detach, few)
    judged = {name: x for name, x in layers.items() if layouts.get(name) in ("rows", "second")}

    def gradients(kept: int) -> tuple[dict[str, list[Tensor | None]], bool]:
        torch.manual_seed(0)
        return _gradients(model, judged, few, len(index), kept, ignore_index)

    try:
        with torch.enable_grad(), own_random(), NoDropout():
            whole, is_sum = gradients(len(index))
            part, _ = gradients(half)
    except GraddotError:
        raise
    except Exception:  # noqa: BLE001 - the model's own code may raise anything
        return
    pairs = [
        (name, _by_row(x, layouts[name], len(index)), _by_row(y, layouts[name], len(index)))
        for name in whole
        for x, y in zip(whole[name], part.get(name, []), strict=False)
        if x is not None and y is not None
    ]
    pairs = [(name, x, y) for name, x, y in pairs if x.numel() and y.shape == x.shape]
    scale = 1.0 if is_sum else _scale(pairs, half)
    for name, x, y in pairs:
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(x.dtype, 0.1)
        x, y = x.double(), y.double()
        size = y[:half].norm()
        if not bool(torch.isfinite(torch.stack([x.norm(), size, y.norm()])).all()):
            continue
        leaked = y[half:].norm() > 1e-6 * size
        changed = (x[:half] - scale * y[:half]).norm() > tolerance * x[:half].norm()
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
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Any,
    rows: int,
    kept: int,
    ignore_index: int,
) -> tuple[dict[str, list[Tensor | None]], bool]:
    """The gradients of every layer's outputs for a loss of the first rows; and whether it is a sum."""
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

    args, kwargs = own_inputs(inputs)
    labels = kwargs.get("labels")
    can_leave_out = isinstance(labels, Tensor) and not labels.is_floating_point()
    if can_leave_out and labels.shape[:1] == (rows,):
        labels[kept:] = ignore_index
    with own_buffers(model):
        with forwards_replaced(layers, seen):
            out = model(*args, **kwargs)
        tensors = [x for x in tensors_in(out) if x.requires_grad and x.is_floating_point()]
        by_rows = [digest(x[:kept]).values for x in tensors if x.shape[:1] == (rows,)]
        losses = [x for x in tensors if x.dim() == 0] if can_leave_out else []
        loss = sum((x.sum() for x in by_rows or losses[:1]), torch.zeros(()))
        outputs = [x for of in found.values() for x in of]
        if not loss.requires_grad or not outputs:
            return {}, True
        grads = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
    return {name: [next(grads) for _ in of] for name, of in found.items()}, bool(by_rows)


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
