"""Whether samples are kept apart in the backward as well: what only it does, no forward shows.

An auxiliary loss whose gradient an autograd function adds, as in DeepSeek's own mixtures of experts, or a
hook that normalises gradients over the batch, mixes samples there. One that clips gradients, each number by
itself or each row's, makes them another sample's by their size: which is 1 / rows of what it is alone, and in
the joint batch another than in regular training.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from ..autocast import autocast_dtype
from ..errors import GraddotError
from .digests import (
    NoDropout,
    digest,
    forwards_replaced,
    held_values,
    own_buffers,
    own_inputs,
    own_random,
    times,
)
from .rows import Layout
from .verify import map_tensors, tensors_in

_Gradients = dict[str, list[Tensor | None]]  # by layer, of each call: (samples, ...), sketched
_SKETCH = 16  # numbers for every vector
_SMALLER = 2.0**-6  # a power of two: nothing is rounded otherwise


def check_backward(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    layouts: Mapping[str, Layout],
    args: Any,
    kwargs: Mapping[str, Any],
    samples: int,
    take: Callable[[Any, list[int]], Any],
    lengths: Sequence[int] | None = None,
    loss_is_of_rows: bool = True,
) -> list[bool]:
    """Raise GraddotError if gradients of the layers' outputs are not those of each sample alone.

    take(inputs, index) gives a model's inputs for some of the samples, which are rows, or share one and
    have `lengths` tokens there. A few of them are run with a loss of all, and again with one of the
    first half. Where the model returns something by samples, the loss is of that, and the others'
    gradients must be zero then; else it is the model's own, and the half runs by itself. In both the
    half's gradients must be the same, but for the scale of a mean. Of a smaller loss of all, gradients must be
    as much smaller. A model that cannot be differentiated so is not judged, nor one that returns its loss
    alone, unless loss_is_of_rows. Returns of each of the model's outputs whether it is by samples.
    """
    judged = {name: x for name, x in layers.items() if _holds_samples(layouts.get(name))}
    batch = _Batch(model, judged, layouts, (args, kwargs), take, lengths)
    index = _some_of(samples, [] if batch.packed else tree_leaves((args, kwargs)))
    half = index[: len(index) // 2]
    try:
        # A checkpoint around the model, or what counts its memory, sees nothing of this.
        unseen = saved_tensors_hooks(Tensor.detach, lambda x: x)
        with torch.enable_grad(), own_random(), NoDropout(), unseen:
            sizes = lambda out: [_size(x, batch.packed) if x.requires_grad else None for x in out]
            both = [{batch.size(half): batch.size(index)}.get(n) for n in batch.run(half, sizes)]
            with _frozen(model):
                whole, by_sample = batch.gradients(index, index, both)
                if not (by_sample or loss_is_of_rows):
                    return []
                of_half = (index, half, both) if by_sample else (half, half, [])
                part, _ = batch.gradients(*of_half)
                small, _ = batch.gradients(index, index, both, _SMALLER)
    except GraddotError:
        raise
    except Exception:  # noqa: BLE001 - the model's own code may raise anything
        return []
    _check_pairs(_pairs(whole, part), batch.size(half), layouts, by_sample, batch.packed)
    _check_proportional(_pairs(whole, small))
    return [n is not None for n in both]


@dataclass
class _Batch:
    """A model's inputs, to be run on some of their samples: which are rows, or share one and have
    `lengths` tokens there. layers are those whose outputs' gradients are asked for."""

    model: nn.Module
    layers: Mapping[str, nn.Module]
    layouts: Mapping[str, Layout]
    inputs: tuple[Any, Mapping[str, Any]]
    take: Callable[[Any, list[int]], Any]
    lengths: Sequence[int] | None

    @property
    def packed(self) -> bool:
        return self.lengths is not None

    def size(self, which: list[int]) -> int:
        """How many rows these samples are, or tokens of the one row."""
        return len(which) if self.lengths is None else sum(self.lengths[i] for i in which)

    def run(self, taken: list[int], use: Callable[[list[Tensor]], Any], seen: Any = None) -> Any:
        """use(outputs) of the model on these samples; seen as in `forwards_replaced`."""
        few = self.take(self.inputs, taken)
        few_args, few_kwargs = own_inputs(tree_map_only(Tensor, Tensor.detach, few))
        torch.manual_seed(0)
        with own_buffers(self.model), forwards_replaced(self.layers if seen else {}, seen):
            return use(list(tensors_in(self.model(*few_args, **few_kwargs))))

    def gradients(
        self, taken: list[int], kept: list[int], both: list[int | None], factor: float = 1.0
    ) -> tuple[_Gradients, bool]:
        """Those of a run on some of the samples, with a loss of those kept, times factor; and whether the
        loss is of outputs by samples. both as in `_loss`."""
        found: _Gradients = {}
        size, packed = self.size(taken), self.packed
        kept_of = lambda name, grad: _sketch(_by_sample(grad, self.layouts[name], size, packed))

        def backward(out: list[Tensor]) -> bool:
            loss, by_sample = _loss(out, self.size(kept), both, self.packed)
            if loss is not None and loss.requires_grad:
                (factor * loss).backward()
            return by_sample

        by_sample = self.run(taken, backward, functools.partial(_seen, found, kept_of))
        return found, by_sample


def _pairs(whole: _Gradients, part: _Gradients) -> list[tuple[str, Tensor, Tensor]]:
    """Gradients of the same call in both runs."""
    return [
        (name, x, y)
        for name, calls in whole.items()
        for x, y in zip(calls, part.get(name, []), strict=False)
        if x is not None and y is not None and x.numel() and x.shape[1:] == y.shape[1:]
    ]


def _sketch(x: Tensor) -> Tensor:
    """(size, ..., W) in less memory: every vector's sums over sixteenths of it, with random signs, which
    in the mean have its norm. The gradients of all layers' outputs themselves, in three runs, were as
    much again as a step with 1024 tokens holds."""
    width = x.shape[-1]
    if x.dim() < 2 or width <= _SKETCH:
        return x.clone()
    generator = torch.Generator().manual_seed(width)
    signs = torch.randn(width, generator=generator, device="cpu").sign()
    each = -(-width // _SKETCH)
    of = torch.arange(width, device="cpu") // each
    directions = torch.zeros(width, _SKETCH, device="cpu").scatter_(1, of[:, None], signs[:, None])
    return times(x, directions).to(x.dtype)


def _check_pairs(
    pairs: list[tuple[str, Tensor, Tensor]],
    half: int,
    layouts: Mapping[str, Layout],
    by_sample: bool,
    packed: bool,
) -> None:
    """Raise GraddotError if in one of the pairs the first `half` rows or tokens differ, or others of
    the second have a gradient."""
    scale = 1.0 if by_sample else _scale(pairs, half)
    largest = max((x[:half].double().norm() for _, x, _ in pairs), default=torch.zeros(()))
    rounded = any(autocast_dtype(x.device.type) or x.itemsize < 4 for _, x, _ in pairs)
    for name, x, y in pairs:
        tolerance = 0.1 if rounded else 1e-3 if x.dtype == torch.float32 else 1e-6
        if rounded and not by_sample and isinstance(layouts[name], int) and not packed:
            continue  # fewer rows are rounded otherwise, and tokens may go to other experts
        x, y = x.double(), y.double()
        norm = y[:half].norm()
        if not bool(torch.isfinite(torch.stack([x.norm(), norm, y.norm()])).all()):
            continue
        leaked = y[half:].norm() > 1e-6 * norm
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


def _check_proportional(pairs: list[tuple[str, Tensor, Tensor]]) -> None:
    """Raise GraddotError if in one of the pairs the second, of a smaller loss, is not as much smaller. Not
    in fp16, where it may be too small."""
    if any(torch.float16 in (x.dtype, autocast_dtype(x.device.type)) for _, x, _ in pairs):
        return
    largest = max((x.double().norm() for _, x, _ in pairs), default=torch.zeros(()))
    rounded = any(autocast_dtype(x.device.type) or x.itemsize < 4 for _, x, _ in pairs)
    for name, x, y in pairs:
        tolerance = 0.1 if rounded else 1e-3 if x.dtype == torch.float32 else 1e-6
        x, y = x.double(), y.double() / _SMALLER
        if not bool(torch.isfinite(torch.stack([x.norm(), y.norm()])).all()):
            continue
        if (x - y).norm() > tolerance * torch.maximum(x.norm(), 1e-3 * largest):
            raise GraddotError(
                f"the gradient of what layer {name} returns is not in proportion to the loss, as where a hook"
                " or an autograd function behind it clips gradients, normalises them or adds to them. A"
                " sample's gradient in a batch is then another than alone, and that of training rows another"
                " with validation rows beside them; clip the parameters' gradients instead, after the backward"
            )


def _some_of(samples: int, inputs: list[Any]) -> list[int]:
    """A few samples from everywhere, as many as no tensor has tokens."""
    sizes = {s for x in inputs if isinstance(x, Tensor) for s in x.shape[1:]}
    count = next((n for n in (4, 3, 2) if n <= samples and n not in sizes), min(samples, 2))
    return [round(i * (samples - 1) / (count - 1)) for i in range(count)]


def _holds_samples(layout: Layout | None) -> bool:
    return isinstance(layout, int) or layout in ("rows", "second")


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside of it a backward reaches nothing that the model holds, nor hooks there: a reentrant
    checkpoint has no backward to chosen tensors only."""
    held = [x for values in held_values(model).values() for x in values.values()]
    tensors = [x for x in (*model.parameters(), *held) if isinstance(x, Tensor)]
    trained = [x for x in tensors if x.requires_grad and x.is_leaf]
    for x in trained:
        x.requires_grad_(False)
    try:
        yield
    finally:
        for x in trained:
            x.requires_grad_(True)


def _seen(
    found: _Gradients,
    kept_of: Callable[[str, Tensor], Tensor],
    name: str,
    forward: Callable[..., Any],
) -> Callable[..., Any]:
    """A layer's forward, whose outputs have a gradient without trainable parameters; what is kept of that of
    the first is found."""

    @functools.wraps(forward)
    def see(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        if torch.is_grad_enabled():  # a reentrant checkpoint comes again, in the backward
            out = map_tensors(out, _with_gradient)
            first = next(iter(tensors_in(out)), None)
            if first is not None and first.grad_fn is not None:
                calls = found.setdefault(name, [])
                own = functools.partial(kept_of, name)
                keep = functools.partial(_keep, own, calls, len(calls), first.output_nr)
                calls.append(None)
                # Behind the tensor's own hooks, which a model may add later: they belong to what is judged.
                first.grad_fn.register_prehook(keep)
        return out

    return see


def _keep(
    kept_of: Callable[[Tensor], Tensor],
    calls: list[Tensor | None],
    call: int,
    output: int,
    grads: Sequence[Tensor | None],
) -> None:
    """Of the gradients that reach what made a call's outputs."""
    grad, before = grads[output], calls[call]
    if grad is not None:
        kept = kept_of(grad)
        calls[call] = kept if before is None else before + kept


def _with_gradient(x: Tensor) -> Tensor:
    if x.requires_grad or not x.is_floating_point():
        return x
    return x.detach().requires_grad_().clone()  # which may be written to, as no leaf may


def _loss(
    out: list[Tensor], kept: int, both: list[int | None], packed: bool
) -> tuple[Tensor | None, bool]:
    """A loss of the first `kept` rows or tokens of what the model returns by samples, and True; or else
    its own, and False. both are the outputs' sizes if they are by samples."""
    by_sample = [x for x, n in zip(out, both, strict=False) if n and _size(x, packed) == n]
    losses = [digest(_first(x, kept, packed)).values.sum() for x in by_sample]
    losses = losses or [x for x in out if x.dim() == 0 and x.requires_grad][:1]
    loss = torch.stack([x.double() for x in losses]).sum() if losses else None
    return loss, bool(by_sample)


def _dim(x: Tensor, in_one: bool) -> int:
    """Which dimension is that of rows, or of tokens where they may lie in one, (1, T, ...)."""
    return int(in_one and x.dim() > 1 and len(x) == 1)


def _size(x: Tensor, packed: bool) -> int | None:
    return x.shape[_dim(x, packed)] if x.dim() else None


def _first(x: Tensor, kept: int, packed: bool) -> Tensor:
    return x.narrow(_dim(x, packed), 0, kept)


def _by_sample(grad: Tensor, layout: Layout, size: int, packed: bool) -> Tensor:
    """(size, ...), by rows, or by tokens of a packed one; empty where the output, unlike the input, has
    none there."""
    flat = isinstance(layout, int)
    tokens = layout if isinstance(layout, int) and not packed else 1
    at = int(layout == "second") or _dim(grad, flat or packed)
    by_heads = packed and grad.dim() > 3 and grad.shape[2] == size  # (1, heads, T, D)
    if grad.dim() <= at or grad.shape[at] != size * tokens or by_heads:
        return grad.new_empty(0)
    return grad.unflatten(at, (size, tokens)).movedim(at, 0)


def _scale(pairs: list[tuple[str, Tensor, Tensor]], half: int) -> float:
    """Of a mean over fewer tokens to that over all, as the gradients have it."""
    halves = [(x[:half].double(), y[:half].double()) for _, x, y in pairs]
    both = sum(float((x * y).sum()) for x, y in halves)
    own = sum(float(y.square().sum()) for _, y in halves)
    return both / own if own else 1.0
