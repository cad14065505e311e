"""Convolutions: linear layers on the patches of their input."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graddot_kernels.sample_dots import bordered

from ..autocast import autocast_input, no_autocast, without_autocast
from ..errors import GraddotError
from ..scored import Scored
from ..shared_uses import SharedUses
from ..step import Step
from .layers import ScoredFunction, accumulator, linear_grad, note_uses, vector_grad

# Output positions up to which a CPU makes the patches of all rows in less time than every row's gradient.
_FEW_POSITIONS = 256


class ConvDot(ScoredFunction):
    """A convolution of groups=1 in one or two dimensions, zero padding, x (rows, Din, *size), or
    (rows·T, Din, *size) with several images a row.

    The patches exist in the backward only, for one layer at a time; where they are many, every row's
    gradient does instead, for one row at a time.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, step, options):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.options = options
        note_uses(ctx, step, weight, bias, vector=False)
        w = weight.to(x.dtype)
        b = None if bias is None else bias.to(x.dtype)
        return (F.conv1d if x.dim() == 3 else F.conv2d)(x, w, b, **options)

    @staticmethod
    @without_autocast
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        step, options, result = ctx.step, ctx.options, [None] * 5
        w, images = weight.to(grad_out.dtype), len(x) // step.rows

        def gradient(begin: int, end: int, of_input: bool) -> Tensor:
            """Of the input, or of the weight, from the rows between."""
            rows = slice(begin * images, end * images)
            return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
                grad_out[rows], x[rows], w, None,
                options["stride"], options["padding"], options["dilation"],
                False, [0] * (x.dim() - 2), 1, [of_input, not of_input, False],
            )[0 if of_input else 1]  # fmt: skip

        if ctx.needs_input_grad[0]:
            result[0] = gradient(0, step.rows, True)
        if ctx.bias_uses is not None:
            row_grads = grad_out.flatten(2).sum(2, dtype=accumulator(grad_out.dtype))
            row_grads = row_grads.view(step.rows, images, -1).sum(1)
            result[2] = vector_grad(step, ctx.bias_uses, row_grads).to(ctx.bias_dtype)
        if ctx.uses is not None:
            positions = grad_out[0, 0].numel() * images
            in_parts = x.is_cuda or step.tokens is not None or x.dtype != accumulator(x.dtype)
            if positions <= _FEW_POSITIONS or in_parts or ctx.uses.paired:
                by_row = lambda x: x.reshape(step.rows, -1, x.shape[2])
                act = by_row(_patches(x, weight.shape[2:], options))
                grad = by_row(grad_out.flatten(2).transpose(1, 2))
                weight_grad = linear_grad(step, ctx.uses, act, grad).view(weight.shape)
            else:
                ctx.uses.linear_terms(x, grad_out)  # of which there are none, but it counts
                weight_grad = _by_row(step, ctx.uses, lambda *rows: gradient(*rows, False))
            result[1] = weight_grad.to(weight.dtype)
        return tuple(result)


def _by_row(step: Step, uses: SharedUses, gradient: Callable[[int, int], Tensor]) -> Tensor:
    """The training gradient of a weight from gradient(begin, end), that of the rows between; the step
    collects its dots."""
    n = step.train_rows
    if step.val_rows:
        ends = itertools.accumulate([n, *step.val_rows])
        directions = [gradient(*rows) for rows in itertools.pairwise(ends)]
    elif uses.given is not None:
        directions = list(step.direction(uses).unbind())
    else:
        return gradient(0, n).mul_(step.scale)
    dot = lambda a, b: torch.sum(a * b, dtype=torch.float64)
    weight_grad, dots, norms = torch.zeros_like(directions[0]), [], []
    for i in range(n):
        row = gradient(i, i + 1)
        dots.append(torch.stack([dot(d, row) for d in directions]))
        if uses.norms:
            norms.append(dot(row, row))
        weight_grad += row
    by_target = torch.stack(dots, 1)
    if uses.norms:
        own = torch.stack([dot(d, d) for d in directions]) if step.val_rows else None
        by_target = bordered(by_target, torch.stack(norms), own)
    step.collect(uses.leaf, by_target)
    return weight_grad.mul_(step.scale)


def _patches(x: Tensor, kernel: torch.Size, options: dict[str, Any]) -> Tensor:
    """The inputs of every output position, (rows, positions, Din·kernel)."""
    if x.dim() == 3:  # a line is an image of height one
        pair = {"stride": 1, "padding": 0, "dilation": 1}
        x, kernel = x.unsqueeze(2), torch.Size((1, *kernel))
        options = {name: (pair[name], *options[name]) for name in pair}
    return F.unfold(x, kernel, **options).transpose(1, 2)


def conv_rule(module: nn.Module, scored: Scored, input: Tensor) -> Tensor:
    """The rule of nn.Conv1d and nn.Conv2d with groups=1."""
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    x = input
    if x.dim() != len(module.kernel_size) + 2 or not scored.has_rows(x):
        raise GraddotError(
            f"layer {scored.name} got an input of shape {tuple(x.shape)}; expected {scored.rows}"
            " rows (training rows, then validation rows) of (channels, *size)"
        )
    padding = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(module.kernel_size)
    act = autocast_input(x)
    options = {"stride": module.stride, "padding": padding, "dilation": module.dilation}
    with no_autocast(act.device.type):
        return ConvDot.apply(act, module.weight, module.bias, scored.step, options)
