"""An autograd function of one's own that takes a whole weight, called row by row. There is one row's
gradient of the weight at a time, so that the weight may be of any size."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from graddot_kernels.sample_dots import bordered, squares

from ..autocast import no_autocast
from ..shared_uses import SharedUses
from ..step import Step
from .layers import ScoredFunction, accumulator


class OneAtATime(ScoredFunction):
    """The tensors that `one(parameter, *inputs)` gives for every row, one row's after the other's. rows
    has the inputs so, as many of each row; the joint batch's order."""

    @staticmethod
    def forward(ctx, parameter, one, step, with_graph, inputs, *rows):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        ctx.step, ctx.uses, ctx.leaf = step, step.uses(parameter), parameter.detach()
        ctx.uses.count_rows()
        ctx.leaf.requires_grad_()
        needed, outputs = ctx.needs_input_grad[5:], []
        ctx.inputs, ctx.outputs = [], []
        for i in range(0, len(rows), inputs):
            own = [
                x.detach().requires_grad_(needed[i + k]) for k, x in enumerate(rows[i : i + inputs])
            ]
            with torch.set_grad_enabled(with_graph):
                out = one(ctx.leaf, *own)
            ctx.inputs.append(own)
            ctx.outputs.append(out)
            outputs += [x.detach() for x in out]
        made = [x for out in ctx.outputs for x in out]
        constant = [x for x, y in zip(outputs, made, strict=True) if not y.requires_grad]
        ctx.mark_non_differentiable(*constant)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        step, uses, leaf, number = ctx.step, ctx.uses, ctx.leaf, len(ctx.inputs[0])
        results: list[Tensor | None] = [None] * (len(ctx.inputs) * number)
        each = len(grads) // len(ctx.inputs)
        dtype = accumulator(leaf.dtype)

        def gradient(i: int) -> Tensor:
            """The parameter's of row i; that of its inputs on the way."""
            own, out = ctx.inputs[i], ctx.outputs[i]
            pairs = zip(out, grads[i * each : (i + 1) * each], strict=True)
            used = [(x, g) for x, g in pairs if g is not None and x.requires_grad]
            at = [k for k, x in enumerate(own) if x.requires_grad]
            if not used:
                return torch.zeros_like(leaf, dtype=dtype)
            found = torch.autograd.grad(
                [x for x, _ in used], [leaf, *(own[k] for k in at)], [g for _, g in used],
                allow_unused=True,
            )  # fmt: skip
            ctx.outputs[i] = None
            for k, x in zip(at, found[1:], strict=True):
                results[i * number + k] = x
            own_grad = torch.zeros_like(leaf) if found[0] is None else found[0]
            return own_grad.to(dtype)

        with no_autocast(leaf.device.type):
            total = _collect(step, uses, gradient, torch.zeros_like(leaf, dtype=dtype))
        return (total.mul_(step.scale).to(leaf.dtype), None, None, None, None, *results)


def _collect(
    step: Step, uses: SharedUses, gradient: Callable[[int], Tensor], total: Tensor
) -> Tensor:
    """`total`, zeros of the parameter's shape, plus the training rows' gradients; the step collects
    their dots with the val rows', which come first, or a given direction."""
    n, kept = step.train_rows, uses.row_parts()
    direction: Tensor | None = None
    if step.val_rows:
        direction = total.new_zeros(len(step.val_rows), *total.shape)
        begins = itertools.accumulate(step.val_rows, initial=n)
        for k, (begin, end) in enumerate(itertools.pairwise(begins)):
            for i in range(begin, end):
                direction[k] += gradient(i)
    elif uses.given is not None:
        step.check_samples(uses.name, n)
        direction = step.direction(uses).to(total.dtype)
    columns = []
    for i in range(n):
        own = gradient(i)
        total += own
        for part in kept:
            part.keep(i, own)
        if direction is not None:
            # By rows first: one long fp32 sum would lose digits.
            column = [torch.linalg.vecdot(target, own).sum() for target in direction]
            columns.append(torch.stack([*column, *(squares(own[None]) if uses.norms else ())]))
    if direction is None:
        return total
    dots = torch.stack(columns, 1)
    if uses.norms:
        dots = bordered(dots[:-1], dots[-1], squares(direction) if step.val_rows else None)
    terms = uses.row_terms(kept, direction)
    step.collect(uses.leaf, dots if terms is None else dots + terms)
    return total


def one_at_a_time(
    one: Callable[..., Any], parameter: Tensor, step: Step, rows: list[tuple[Tensor, ...]]
) -> Any:
    """one(*row, parameter=parameter) of every row, the results one after the other in their first
    dimension."""
    form: list[Any] = []

    def tensors(parameter: Tensor, *row: Tensor) -> list[Tensor]:
        form[:] = tree_flatten(one(*row, parameter=parameter))
        return [x for x in form[0] if isinstance(x, Tensor)]

    flat = [x for row in rows for x in row]
    with_graph = torch.is_grad_enabled()
    outputs = OneAtATime.apply(parameter, tensors, step, with_graph, len(rows[0]), *flat)
    each = len(outputs) // len(rows)
    whole = iter(torch.cat(outputs[k::each]) for k in range(each))
    return tree_unflatten([next(whole) if isinstance(x, Tensor) else x for x in form[0]], form[1])
