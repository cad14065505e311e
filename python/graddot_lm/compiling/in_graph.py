"""Layers that a graph of torch.compile scores by its own operations.

An op that runs a layer's rule (compiled.py) takes the host longer than most layers take the device,
and nothing can be fused with it. The layers here, nearly all of a transformer, are traced instead:
linear layers, layer norms and RMS norms whose input has the rows in front and whose parameters are
used once a step. Their dots leave the graph as the gradient of a tensor of the engine's, a sink,
which the forward takes and does not look at. A graph's backward asks once for the step's scale, by an op;
the engine counts by it which layers' backwards ran how often.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from transformers.pytorch_utils import Conv1D

from graddot_kernels.sample_dots import bordered

from ..autocast import autocast_input, no_autocast
from ..rules.layers import accumulator, rms_norm_backward, weight_grad_dot
from ..shared_uses import vector_form
from .compiled import new_site, owner, site_of
from .compiler import left_to_autograd


class GraphInputs(NamedTuple):
    """What a layer's operations in a graph take besides its input and parameters.

    sink is (P, K, N) of P parameters, with norms a row and perhaps a column more, as dots are in
    `step.Step`; directions are those given, (K, *shape) each, none where val rows ride along.
    """

    sink: Tensor
    val_rows: list[int]
    norms: bool
    directions: list[Tensor]


# By the key of a layer's scored forward; no attribute of it for the reason that `tracing.rows_of` is none.
inputs_of: dict[str, GraphInputs] = {}


def enter_graph(key: str) -> bool:
    """Tell the engine of this key that layers of it are traced. Runs while the compiler traces."""
    owner(key).in_graph.enter()
    return True


enter_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]  # assume_constant_result


# The layers, traced with their backward


class _Uses:
    """The gradients and the dots of one layer's parameters, in its backward."""

    def __init__(self, site: int, inputs: GraphInputs, rows: int, grad: Tensor) -> None:
        self.inputs, self.n = inputs, rows - sum(inputs.val_rows)
        self.scale = _scale(site, grad)
        self._dots: list[Tensor] = []

    def linear(self, act: Tensor, grad: Tensor) -> Tensor:
        """The training gradient (Dout, Din) of a weight, as `layers.linear_grad`."""
        inputs = self.inputs
        direction = None if inputs.val_rows else inputs.directions[len(self._dots)]
        weight_grad, dots = weight_grad_dot(
            inputs.val_rows, direction, inputs.norms, act, grad, self.scale
        )
        self._dots.append(dots)
        return weight_grad

    def vector(self, rows: Tensor) -> Tensor:
        """That of a bias or a norm's weight, (d,), from its row gradients, as `layers.vector_grad`."""
        inputs = self.inputs
        if inputs.val_rows:
            dots = vector_form(rows, rows, inputs.val_rows, inputs.norms, _products)
        else:
            direction = inputs.directions[len(self._dots)].flatten(1)
            dots = _products(direction.to(rows.dtype), rows)
            dots = bordered(dots, rows.square().sum(1)) if inputs.norms else dots
        self._dots.append(dots)
        return rows[: self.n].sum(0) * self.scale.to(rows.dtype)

    def sink_grad(self) -> Tensor:
        return torch.stack([x.to(self.inputs.sink.dtype) for x in self._dots])


def _products(direction: Tensor, samples: Tensor) -> Tensor:
    """direction @ samples.T of (K, d) and (N, d), as a sum that the compiler fuses with what is around it:
    a matrix product of a few rows takes longer to call than to make."""
    return (direction[:, None] * samples).sum(2)


class _Asked:
    """The backward that is traced: its number, and by engine the site of the layer that it reached first
    and the scale that this asked for."""

    task = -1
    scales: ClassVar[dict[str, tuple[int, Tensor]]] = {}

    @classmethod
    def forget(cls) -> None:
        cls.task, cls.scales = -1, {}


def _scale(site: int, grad: Tensor) -> Tensor:
    """The step's scale, 0-dim fp64, in the backward of the layer of this site, whose output has this
    gradient: known once the forward is through, as the fused head may count the labels.

    In a graph all layers take that of the first: an op takes the host long, and CUDA graphs end at it.
    """
    if not isinstance(grad, (FakeTensor, FunctionalTensor)):  # no graph holds this backward
        return torch.ops.graddot_lm.scale(site, grad)  # type: ignore[no-any-return]
    task, layer = torch._C._current_graph_task_id(), site_of(site)
    if task != _Asked.task:
        _Asked.forget()
        _Asked.task = task
        torch.autograd.Variable._execution_engine.queue_callback(_Asked.forget)
    found = _Asked.scales.get(layer.engine)
    if found is not None:
        first, scale = found
        site_of(first).layers.append(layer.name)
        return scale
    layer.layers = [layer.name]  # of the latest trace
    scale = torch.ops.graddot_lm.scale(site, grad)
    _Asked.scales[layer.engine] = site, scale
    return scale


def _by_row(x: Tensor) -> Tensor:
    """(rows, ..., D) as (rows, T, D)."""
    # A view is one more call for the compiler to trace, which takes milliseconds where sizes vary.
    return x if x.dim() == 3 else x.reshape(x.shape[0], -1, x.shape[-1])


class _Linear(torch.autograd.Function):
    """A linear layer, as `layers.LinearDot`."""

    @staticmethod
    def forward(ctx, x, weight, bias, sink, inputs, site, transposed):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.inputs, ctx.site, ctx.transposed = inputs, site, transposed
        ctx.bias_dtype = None if bias is None else bias.dtype
        w = weight.to(x.dtype)
        return F.linear(x, w.t() if transposed else w, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        with no_autocast(grad_out.device.type):
            uses = _Uses(ctx.site, ctx.inputs, x.shape[0], grad_out)
            act, grad = _by_row(x), _by_row(grad_out)
            swapped = (grad, act) if ctx.transposed else (act, grad)
            weight_grad, bias_grad = uses.linear(*swapped).to(weight.dtype), None
            if ctx.bias_dtype is not None:
                rows = grad.sum(1, dtype=accumulator(grad.dtype))
                bias_grad = uses.vector(rows).to(ctx.bias_dtype)
            w = weight.to(grad_out.dtype)
            x_grad = grad_out @ (w.t() if ctx.transposed else w)
            return x_grad, weight_grad, bias_grad, uses.sink_grad(), None, None, None


class _LayerNorm(torch.autograd.Function):
    """A layer norm, as `layers.LayerNormDot`."""

    @staticmethod
    def forward(ctx, x, weight, bias, sink, inputs, site, shape, eps):  # type: ignore[no-untyped-def]
        out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.inputs, ctx.site, ctx.shape = inputs, site, shape
        return out

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        x, mean, rstd, weight, bias = ctx.saved_tensors
        with no_autocast(grad_out.device.type):
            uses = _Uses(ctx.site, ctx.inputs, x.shape[0], grad_out)
            x_grad = torch.ops.aten.native_layer_norm_backward(
                grad_out, x, ctx.shape, mean, rstd, weight, bias, [True, False, False]
            )[0]
            grad = grad_out.to(accumulator(x.dtype))
            normed = (x.to(grad.dtype) - mean) * rstd
            of_rows = [_by_row(y.flatten(-len(ctx.shape))).sum(1) for y in (grad * normed, grad)]
            weight_grad = uses.vector(of_rows[0]).view(weight.shape).to(weight.dtype)
            bias_grad = None
            if bias is not None:
                bias_grad = uses.vector(of_rows[1]).view(bias.shape).to(bias.dtype)
            return x_grad, weight_grad, bias_grad, uses.sink_grad(), None, None, None, None


class _RMSNorm(torch.autograd.Function):
    """An RMS norm whose forward made `value`, as `norms.RMSNormDot`."""

    @staticmethod
    def forward(ctx, x, weight, value, sink, inputs, site, eps, offset):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.inputs, ctx.site, ctx.eps, ctx.offset = inputs, site, eps, offset
        return value.clone()

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        with no_autocast(grad_out.device.type):
            uses = _Uses(ctx.site, ctx.inputs, x.shape[0], grad_out)
            x_grad, normed, grad = rms_norm_backward(x, weight, grad_out, ctx.eps, ctx.offset)
            weight_grad = uses.vector(_by_row(grad * normed).sum(1)).to(weight.dtype)
            return x_grad, weight_grad, None, uses.sink_grad(), None, None, None, None


@left_to_autograd
def _linear(x: Tensor, *arguments: Any) -> Tensor:
    x = autocast_input(x)
    with no_autocast(x.device.type):
        return _Linear.apply(x, *arguments)  # type: ignore[no-any-return]


@left_to_autograd
def _layer_norm(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):  # native autocast normalises in fp32
        x = x.to(weight.dtype)
    return _LayerNorm.apply(x, weight, *arguments)  # type: ignore[no-any-return]


@left_to_autograd
def _rms_norm(*arguments: Any) -> Tensor:
    return _RMSNorm.apply(*arguments)  # type: ignore[no-any-return]


def linear(scored: Any, inputs: GraphInputs, x: Tensor) -> Tensor:
    """The output of a scored linear layer, in a graph."""
    module, site = scored.module, new_site(_LayerBackward, scored.key)
    transposed = isinstance(module, Conv1D)
    return _linear(x, module.weight, module.bias, inputs.sink, inputs, site, transposed)


def layer_norm(scored: Any, inputs: GraphInputs, x: Tensor) -> Tensor:
    """That of a layer norm."""
    module, site = scored.module, new_site(_LayerBackward, scored.key)
    form = list(module.normalized_shape), module.eps
    return _layer_norm(x, module.weight, module.bias, inputs.sink, inputs, site, *form)


def rms_norm(form: Any, scored: Any, inputs: GraphInputs, x: Tensor) -> Tensor:
    """That of an RMS norm of this form, with whatever casts its own forward makes."""
    with torch.no_grad():
        value = scored.own_forward(x.detach())
    (weight,) = scored.module.parameters()
    site, eps = new_site(_LayerBackward, scored.key), form.eps_for(accumulator(x.dtype))
    return _rms_norm(x, weight, value, inputs.sink, inputs, site, eps, form.offset)


class _LayerBackward:
    """The backward of one call of a scored layer in a graph, when it runs; and of those that took their
    scale from it."""

    def __init__(self, scored: Any) -> None:
        self._model_forward, self.name = scored.model_forward, scored.name
        self.engine, self.layers = scored.model_forward.key, [scored.name]

    def scale(self) -> Tensor:
        return self._model_forward.in_graph.scale(self.layers)  # type: ignore[no-any-return]
