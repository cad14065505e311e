"""Convolutions: linear layers on the patches of their input."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import GraddotError
from .layers import (
    ScoredFunction,
    accumulator,
    linear_grad,
    no_autocast,
    note_uses,
    vector_grad,
    without_autocast,
)
from .scored import Scored, autocast_input


class ConvDot(ScoredFunction):
    """A convolution of groups=1 in one or two dimensions, zero padding, x (rows, Din, *size), or
    (rows·T, Din, *size) with several images a row.

    The patches exist in the backward only, for one layer at a time.
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
        if ctx.needs_input_grad[0]:
            result[0] = torch.ops.aten.convolution_backward(
                grad_out, x, weight.to(grad_out.dtype), None,
                options["stride"], options["padding"], options["dilation"],
                False, [0] * (x.dim() - 2), 1, [True, False, False],
            )[0]  # fmt: skip
        by_row = lambda x: x.reshape(step.rows, -1, x.shape[2])
        grad = by_row(grad_out.flatten(2).transpose(1, 2))
        if ctx.bias_uses is not None:
            row_grads = grad.sum(1, dtype=accumulator(grad.dtype))
            result[2] = vector_grad(step, ctx.bias_uses, row_grads).to(ctx.bias_dtype)
        if ctx.uses is not None:
            act = by_row(_patches(x, weight.shape[2:], options))
            weight_grad = linear_grad(step, ctx.uses, act, grad)
            result[1] = weight_grad.view(weight.shape).to(weight.dtype)
        return tuple(result)


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
