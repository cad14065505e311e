"""Layers whose backward also gives every training sample's dot product with the val gradient.

The functions replace a layer's forward while a step is active. The weight gradient that they return
is that of the training rows, in the scale of training alone; the dots, (K, N) a use of a parameter,
are collected by the step, which adds them up. Rows of the joint batch come first in every
activation: N training rows, then val_rows[k] rows of target k.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from graddot_kernels import cpu_kernels
from graddot_kernels.sample_dots import bordered
from graddot_kernels.torch_impl import column_sums, linear, mm

from ..autocast import without_autocast
from ..shared_uses import SharedUses, products
from ..step import Step
from .recompute import made_of

_ops = torch.ops.graddot


def vector_grad(
    step: Step, uses: SharedUses, row_grads: Tensor, *, borrowed: bool = False
) -> Tensor:
    """The training gradient (d,) of a bias or norm weight from its row gradients; the step collects
    its dots. borrowed as in `Step.collect_rows`."""
    cross_terms = uses.vector_terms(row_grads)
    if cross_terms is not None:
        step.collect(uses.leaf, cross_terms)
    train = row_grads
    if step.val_rows:
        step.collect_rows(uses.leaf, row_grads, borrowed=borrowed)
        train = row_grads[: step.train_rows]
    elif uses.given is not None:
        step.check_samples(uses.name, row_grads.shape[0])
        direction = step.direction(uses)
        direction = direction.reshape(len(direction), -1)  # of a scalar, too
        dots = products(direction.to(row_grads.dtype), row_grads)
        step.collect(uses.leaf, bordered(dots, row_grads.square().sum(1)) if uses.norms else dots)
    return torch.matmul(step.scales(train.shape[0], train.dtype), train)


def linear_grad(step: Step, uses: SharedUses, act: Tensor, grad: Tensor) -> Tensor:
    """The training gradient (Dout, Din) of a weight from (rows, T, Din) and (rows, T, Dout); the
    step collects its dots."""
    cross_terms = uses.linear_terms(act, grad)
    if cross_terms is not None:
        step.collect(uses.leaf, cross_terms)
    if not step.val_rows and uses.given is None:
        return (grad.flatten(0, 1).t() @ act.flatten(0, 1)).mul_(step.scale)
    direction = None
    if not step.val_rows:
        step.check_samples(uses.name, act.shape[0])
        direction = step.direction(uses).flatten(2)  # a convolution's has its kernel's dimensions
    weight_grad, dots = weight_grad_dot(step.val_rows, direction, uses.norms, act, grad, step.scale)
    step.collect(uses.leaf, dots)
    return weight_grad


def weight_grad_dot(
    val_rows: list[int],
    direction: Tensor | None,
    norms: bool,
    act: Tensor,
    grad: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """The training gradient (Dout, Din) and the dots, with the direction (K, Dout, Din) or else with that
    of the val rows."""
    if direction is None:
        return _ops.linear_joint_wgrad_dot(act, grad, val_rows, scale, norms)  # type: ignore[no-any-return]
    direction = direction.to(accumulator(act.dtype))  # weights may be cast, as a router's
    return _ops.linear_wgrad_dot(direction, act, grad, scale, norms)  # type: ignore[no-any-return]


def _embedding_grad(step: Step, uses: SharedUses, ids: Tensor, grad: Tensor) -> Tensor:
    """The training gradient (num_embeddings, d) of a table; the step collects its dots."""
    padding = -1 if uses.padding_idx is None else uses.padding_idx
    cross_terms = uses.embedding_terms(ids, grad)
    if cross_terms is not None:
        step.collect(uses.leaf, cross_terms)
    dots: Tensor | None
    if uses.held is not None:
        step.check_samples(uses.name, ids.shape[0])
        weight_grad = uses.add_rows(ids, grad, step.scale)
        given = None if uses.given is None else step.direction(uses)
        dots = uses.embedding_dots(ids, grad, given)
    elif step.val_rows:
        weight_grad, dots = _ops.embedding_joint_wgrad_dot(
            ids, grad, step.val_rows, uses.num_embeddings, padding, step.scale
        )
        dots = uses.with_embedding_norms(dots, ids, grad)
    elif uses.given is not None:
        step.check_samples(uses.name, ids.shape[0])
        direction = step.direction(uses)
        grad = grad.to(direction.dtype)
        weight_grad, dots = _ops.embedding_wgrad_dot(direction, ids, grad, padding, step.scale)
        dots = uses.with_embedding_norms(dots, ids, grad)
    else:
        weight_grad = torch.ops.aten.embedding_dense_backward(
            grad, ids, uses.num_embeddings, padding, False
        )
        weight_grad, dots = weight_grad.mul_(step.scale), None
    if dots is not None:
        step.collect(uses.leaf, dots)
    return weight_grad


class ScoredFunction(torch.autograd.Function):
    """Base of the functions that score the parameters they take."""


def note_uses(ctx, step, weight, bias, *, vector):  # type: ignore[no-untyped-def]
    """ctx.uses and ctx.bias_uses of a layer's weight, needs_input_grad[1], a vector or a matrix,
    and bias, [2]; None where no gradient is needed. In the forward, so that uses are counted."""
    ctx.step, ctx.uses, ctx.bias_uses = step, None, None
    if ctx.needs_input_grad[1]:
        ctx.uses = step.uses(weight)
        if vector:
            ctx.uses.count_vector()
        else:
            ctx.uses.count_linear()
    if bias is not None and ctx.needs_input_grad[2]:
        ctx.bias_dtype = bias.dtype
        ctx.bias_uses = step.uses(bias)
        ctx.bias_uses.count_vector()


class PerSampleDot(ScoredFunction):
    """A parameter as (rows, *shape), a copy for every row: scores whatever is computed with it."""

    @staticmethod
    def forward(ctx, parameter, step):  # type: ignore[no-untyped-def]
        ctx.step, ctx.shape, ctx.dtype = step, parameter.shape, parameter.dtype
        ctx.uses = step.uses(parameter)
        ctx.uses.count_vector()
        return parameter.expand(step.rows, *parameter.shape)

    @staticmethod
    @without_autocast
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        row_grads = grad_out.reshape(len(grad_out), -1).to(accumulator(grad_out.dtype))
        grad = vector_grad(ctx.step, ctx.uses, row_grads, borrowed=True)
        return grad.view(ctx.shape).to(ctx.dtype), None


class LinearDot(ScoredFunction):
    """A linear layer; `transposed` when the weight is stored (Din, Dout), as HF Conv1D does."""

    @staticmethod
    def forward(ctx, x, weight, bias, step, transposed):  # type: ignore[no-untyped-def]
        w = cast(weight, x.dtype)
        sources: tuple[Tensor | None, ...] = ()
        if ctx.needs_input_grad[1]:
            ctx.make_input, sources = made_of(x, weight.shape[1 if transposed else 0])
        ctx.save_for_backward(weight, *sources)
        ctx.transposed = transposed
        note_uses(ctx, step, weight, bias, vector=False)
        b = None if bias is None else cast(bias, x.dtype)
        out = linear(x.flatten(0, -2), w.t() if transposed else w, b)
        # No view, which a function's output that is modified in place (an activation) may not be.
        return torch.ops.aten._unsafe_view.default(out, [*x.shape[:-1], out.shape[1]])

    @staticmethod
    @without_autocast
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        weight, *sources = ctx.saved_tensors
        step, result = ctx.step, [None] * 5
        grad = step.as_samples(grad_out)
        if ctx.bias_uses is not None:
            row_grads = column_sums(grad)
            result[2] = cast(vector_grad(step, ctx.bias_uses, row_grads), ctx.bias_dtype)
        if ctx.uses is not None:
            act = step.as_samples(ctx.make_input(*sources))
            if ctx.transposed:  # G_i is (Din, Dout): the same product with the sides swapped
                act, grad = grad, act
            weight_grad = linear_grad(step, ctx.uses, act, grad)
            del act, grad  # an input made again goes before the gradient of its size comes
            if not ctx.uses.hold(weight_grad):
                result[1] = cast(weight_grad, weight.dtype)
        if ctx.needs_input_grad[0]:
            w = cast(weight, grad_out.dtype)
            x_grad = mm(grad_out.flatten(0, -2), w.t() if ctx.transposed else w)
            result[0] = x_grad.view(*grad_out.shape[:-1], x_grad.shape[1])
        return tuple(result)


class EmbeddingDot(ScoredFunction):
    """An embedding; `same` when the ids were the same for every row, as position ids are."""

    @staticmethod
    def forward(ctx, ids, weight, step, padding_idx, same):  # type: ignore[no-untyped-def]
        if same:
            out = F.embedding(ids[0], weight, padding_idx).expand(step.rows, -1, -1)
        else:
            out = F.embedding(ids, weight, padding_idx)
        ids = ids.reshape(step.rows, -1)
        ctx.save_for_backward(ids)
        ctx.step, ctx.dtype, ctx.padding_idx = step, weight.dtype, padding_idx
        ctx.uses = step.uses(weight)
        ctx.uses.num_embeddings = weight.shape[0]
        ctx.uses.count_embedding(ids, padding_idx)
        return out

    @staticmethod
    @without_autocast
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        (ids,) = ctx.saved_tensors
        grad = ctx.step.as_samples(grad_out)
        ids = ctx.step.as_samples(ids.view(*grad_out.shape[:-1], 1)).reshape(grad.shape[:2])
        if ctx.uses.padding_idx != ctx.padding_idx:  # other uses have another
            grad = grad.masked_fill((ids == ctx.padding_idx)[..., None], 0)
        weight_grad = _embedding_grad(ctx.step, ctx.uses, ids, grad)
        return None, weight_grad.to(ctx.dtype), None, None, None


def _layer_norm_backward(  # type: ignore[no-untyped-def]
    step, shape, x_needed, grad, x, mean, rstd, weight, bias
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradient of x, if it is needed, and the weight's and the bias's row gradients, (rows, d)."""
    like = x.shape
    if len(shape) > 1:
        grad, x, mean, rstd = (y.flatten(-len(shape)) for y in (grad, x, mean, rstd))
    fused = has_norm_kernel(step, x, grad, weight)
    x_grad = None
    if x_needed and not fused:
        x_grad = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), x, [x.shape[-1]], mean, rstd, weight.flatten(),
            None if bias is None else bias.flatten(), [True, False, False],
        )[0].view(like)  # fmt: skip
    x, grad, mean, rstd = map(step.as_samples, (x, grad, mean, rstd))
    mean, rstd = mean[..., 0], rstd[..., 0]
    if not fused:
        weight_rows, bias_rows = _ops.norm_sample_grads(x, grad, mean, rstd)
        return x_grad, weight_rows, bias_rows
    scale = weight.flatten() if x_needed else None
    x_grad, weight_rows, bias_rows = cpu_kernels.norm_backward(x, grad, scale, mean, rstd)
    return None if x_grad is None else x_grad.view(like), weight_rows, bias_rows


def has_norm_kernel(step: Step, x: Tensor, grad: Tensor, weight: Tensor) -> bool:
    """Whether one compiled kernel makes all gradients of a norm of these."""
    plain = step.tokens is None and x.dtype == grad.dtype == weight.dtype
    return plain and cpu_kernels.norms_available(x)


class LayerNormDot(ScoredFunction):
    """A layer norm with weight and optional bias."""

    @staticmethod
    def forward(ctx, x, weight, bias, step, shape, eps):  # type: ignore[no-untyped-def]
        out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.shape = shape
        note_uses(ctx, step, weight, bias, vector=True)
        return out

    @staticmethod
    @without_autocast
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        x, mean, rstd, weight, bias = ctx.saved_tensors
        result = [None] * 6
        result[0], weight_rows, bias_rows = _layer_norm_backward(
            ctx.step, ctx.shape, ctx.needs_input_grad[0], grad_out, x, mean, rstd, weight, bias
        )
        for uses, rows, parameter, at in (
            (ctx.uses, weight_rows, weight, 1),
            (ctx.bias_uses, bias_rows, bias, 2),
        ):
            if uses is not None:
                grad = vector_grad(ctx.step, uses, rows)
                result[at] = cast(grad.view(parameter.shape), parameter.dtype)
        return tuple(result)


def rms_norm_backward(
    x: Tensor, weight: Tensor, grad_out: Tensor, eps: float, offset: float, x_needed: bool = True
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradient of an RMS norm's input, x · rsqrt(mean(x²) + eps) · (offset + weight), if it is
    needed; and, in at least fp32, the normed input and grad_out, whose product summed over a row's
    tokens is the weight's."""
    wide = x.to(accumulator(x.dtype))
    grad = grad_out.to(wide.dtype)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * rstd
    if not x_needed:
        return None, normed, grad
    scaled = grad * (offset + weight.to(wide.dtype))
    x_grad = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return x_grad.to(x.dtype), normed, grad


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which takes its time also where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
