"""Layers whose backward also returns every training sample's dot product with the val gradient.

Pretend that sample i runs with weights W + ε_i·D, D the gradient of the val rows. Then ∂L/∂ε_i is
⟨D, G_i⟩: the score is the gradient of a leaf. Each function below takes such a `sink`, (K, N), that
its forward ignores, and returns the dots as the sink's gradient; autograd adds the uses up. The
weight gradient that they return is that of the training rows, in the scale of training alone.

The functions replace a layer's forward while a step is active. Rows of the joint batch come first
in every activation: N training rows, then val_rows[k] rows of target k.
"""

import functools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from graddot_kernels import norm_sample_grads
from graddot_kernels.sample_dots import bordered

from .errors import GraddotError
from .recompute import made_of
from .shared_uses import SharedUses

_ops = torch.ops.graddot


@dataclass
class Step:
    """One micro-batch: what the layers need to know about the rows that run through them.

    scale is M / n_train (0-dim): it turns the training rows' part of the joint loss's gradient
    into the gradient of the training loss. sinks maps id(parameter) to the leaf that collects its
    dots; a parameter without one is trained but not scored. With given directions, (K, *shape) by
    id(parameter), there are no val_rows; with `tokens`, T, every token of a row is then scored as
    a sample of its own, and a sink is (K, N·T). With `norms` a sink has one more row, ‖G_i‖², and
    with val_rows one more column, ‖D_k‖². layouts says by layer name how its input holds the rows,
    as `rows.find_layouts` saw it; first is True in the step that saw it. Of sharded weights a
    layer's backward may only use its own.
    """

    rows: int
    val_rows: list[int]
    scale: Tensor
    sinks: dict[int, Tensor]
    directions: dict[int, Tensor] = field(default_factory=dict)
    tokens: int | None = None
    sharded: bool = False
    layouts: dict[str, str | int] = field(default_factory=dict)
    first: bool = False
    norms: bool = False
    shared: dict[int, SharedUses] = field(default_factory=dict)

    def as_samples(self, x: Tensor) -> Tensor:
        """(rows, ..., D) as (samples, T, D): a sample is a row, or with `tokens` a token."""
        if self.tokens is not None:
            return x.reshape(-1, 1, x.shape[-1])
        return x.reshape(self.rows, -1, x.shape[-1])

    def check_samples(self, name: str, samples: int) -> None:
        if self.tokens is not None and samples != self.rows * self.tokens:
            raise GraddotError(
                f"{name} is used on {samples} tokens of {self.rows} rows; expected {self.tokens} a"
                " row, as there are labels. Scores by token need every layer to see every token;"
                " leave per_token out, or exclude the parameter"
            )

    def uses(self, name: str, parameter: Tensor) -> SharedUses:
        key = id(parameter)
        if key not in self.shared:
            direction = self.directions.get(key)
            scored = bool(self.val_rows) or direction is not None
            self.shared[key] = SharedUses(name, self.val_rows, direction, self.norms and scored)
        return self.shared[key]

    def sink(self, parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else self.sinks.get(id(parameter))

    def row_tokens(self, name: str) -> int:
        """T of a layer whose input has the tokens of each row one after the other, else 0."""
        layout = self.layouts.get(name)
        return layout if isinstance(layout, int) else 0

    def _has_rows_first(self, name: str, x: Tensor, dims: int) -> bool:
        """A layer that was not judged is believed when its input has a dimension to spare."""
        layout = self.layouts.get(name, "unseen" if self.layouts else "rows")
        enough = dims if layout == "rows" else dims + 1
        known = layout in ("rows", "unseen")
        return known and x.dim() >= enough and x.shape[0] == self.rows

    def _is_same(self, name: str) -> bool:
        """Whether a layer's input is the same for every row, so that its output gets rows first."""
        same = self.layouts.get(name) == "same"
        if same and "second" in self.layouts.values():
            raise GraddotError(
                f"layer {name} got an input without rows, in a model that elsewhere has them as the"
                " second dimension; expand the input over the rows, as (T, rows)"
            )
        return same

    def as_rows(self, name: str, x: Tensor) -> Tensor:
        """A layer's input with the rows as its first dimension: (rows, ..., D).

        Takes (rows, ..., D); (T, rows, ..., D), or (rows·T, ..., D) with the rows one after the
        other, where they were seen to lie so; and (1, ..., D) or (T, D), the same for every row,
        which is expanded.
        """
        same = self._is_same(name)
        if self._has_rows_first(name, x, 2):
            return x
        tokens = self.row_tokens(name)
        if tokens and x.dim() >= 2 and x.shape[0] == self.rows * tokens:
            return x.unflatten(0, (self.rows, tokens))
        if self.layouts.get(name) == "second" and x.dim() >= 3 and x.shape[1] == self.rows:
            return x.transpose(0, 1)
        if same and x.dim() >= 2 and (x.shape[0] == 1 or x.dim() == 2):
            return x.expand(self.rows, *(x.shape[1:] if x.shape[0] == 1 else x.shape))
        raise GraddotError(
            f"layer {name} got an input of shape {tuple(x.shape)}; expected {self.rows} rows"
            " (training rows, then validation rows) as the first dimension. Layers that mix"
            " samples cannot be scored."
        )

    def id_rows(self, name: str, ids: Tensor) -> Tensor:
        """Ids of (rows, ...), or as `as_rows` takes them, or of (1, T) or (T,), the same for every
        row, as (rows, ...)."""
        same = self._is_same(name)
        if self.layouts.get(name) == "second" and ids.dim() >= 2 and ids.shape[1] == self.rows:
            return ids.transpose(0, 1)
        if ids.dim() == 2 and ids.shape[0] == 1:  # there are two rows at least
            return ids.expand(self.rows, ids.shape[1])
        if self._has_rows_first(name, ids, 1):
            return ids
        tokens = self.row_tokens(name)
        if tokens and ids.dim() >= 1 and ids.shape[0] == self.rows * tokens:
            return ids.unflatten(0, (self.rows, tokens))
        if same and ids.dim() == 1:
            return ids.expand(self.rows, ids.shape[0])
        raise GraddotError(
            f"embedding {name} got ids of shape {tuple(ids.shape)}"
            + (" that are the same for every row" if same else "")
            + f"; expected {self.rows} rows (training rows, then validation rows), or (1, T) or"
            " (T,) to be broadcast over them"
        )


def _add(dots: Tensor, cross_terms: Tensor | None) -> Tensor:
    return dots if cross_terms is None else dots + cross_terms


def vector_grad(step: Step, uses: SharedUses, row_grads: Tensor) -> tuple[Tensor, Tensor | None]:
    """The training gradient (d,) and dots (K, N) of a bias or norm weight from its row gradients.

    No dots where directions are given and the parameter, not scored, has none.
    """
    n = step.rows - sum(step.val_rows)
    dots, cross_terms = None, uses.vector_terms(row_grads)
    if step.val_rows:
        dots = _add(uses.vector_form(row_grads, row_grads), cross_terms)
    elif uses.given is not None:
        step.check_samples(uses.name, row_grads.shape[0])
        dots = uses.direction().flatten(1).to(row_grads.dtype) @ row_grads.t()
        if uses.norms:
            dots = _add(bordered(dots, row_grads.square().sum(1)), cross_terms)
    return row_grads[: n if step.val_rows else None].sum(0).mul_(step.scale), dots


def linear_grad(
    step: Step, uses: SharedUses, act: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The training gradient (Dout, Din) and dots (K, N) of a weight from (rows, T, Din) and
    (rows, T, Dout); no dots as in `vector_grad`."""
    cross_terms = uses.linear_terms(act, grad)
    if step.val_rows:
        weight_grad, dots = _ops.linear_joint_wgrad_dot(
            act, grad, step.val_rows, step.scale, uses.norms
        )
        return weight_grad, _add(dots, cross_terms)
    if uses.given is not None:
        step.check_samples(uses.name, act.shape[0])
        direction = uses.direction().flatten(2)  # a convolution's has its kernel's dimensions
        weight_grad, dots = _ops.linear_wgrad_dot(direction, act, grad, step.scale, uses.norms)
        return weight_grad, _add(dots, cross_terms)
    return (grad.flatten(0, 1).t() @ act.flatten(0, 1)).mul_(step.scale), None


def _embedding_grad(
    step: Step, uses: SharedUses, ids: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The training gradient (num_embeddings, d) and dots (K, N) of a table; no dots as above."""
    padding = -1 if uses.padding_idx is None else uses.padding_idx
    cross_terms = uses.embedding_terms(ids, grad)
    dots: Tensor | None
    if uses.held is not None:
        step.check_samples(uses.name, ids.shape[0])
        weight_grad, dots = uses.add_rows(ids, grad, step.scale), uses.embedding_dots(ids, grad)
    elif step.val_rows:
        weight_grad, dots = _ops.embedding_joint_wgrad_dot(
            ids, grad, step.val_rows, uses.num_embeddings, padding, step.scale
        )
        dots = uses.with_embedding_norms(dots, ids, grad)
    elif uses.given is not None:
        step.check_samples(uses.name, ids.shape[0])
        direction = uses.direction()
        grad = grad.to(direction.dtype)
        weight_grad, dots = _ops.embedding_wgrad_dot(direction, ids, grad, padding, step.scale)
        dots = uses.with_embedding_norms(dots, ids, grad)
    else:
        weight_grad = torch.ops.aten.embedding_dense_backward(
            grad, ids, uses.num_embeddings, padding, False
        )
        weight_grad, dots = weight_grad.mul_(step.scale), None
    return weight_grad, None if dots is None else _add(dots, cross_terms)


def without_autocast(backward):  # type: ignore[no-untyped-def]
    """Backward under an autocast region that the caller left open: dots must not be rounded."""

    @functools.wraps(backward)
    def wrapped(ctx, grad_out):  # type: ignore[no-untyped-def]
        with torch.autocast(grad_out.device.type, enabled=False):
            return backward(ctx, grad_out)

    return wrapped


class ScoredFunction(torch.autograd.Function):
    """Base of the functions that score the parameters they take."""


def note_uses(ctx, step, names, weight, bias, *, vector):  # type: ignore[no-untyped-def]
    """ctx.uses and ctx.bias_uses of a layer's weight, needs_input_grad[1], a vector or a matrix,
    and bias, [2]; None where no gradient is needed. In the forward, so that uses are counted."""
    ctx.step, ctx.uses, ctx.bias_uses = step, None, None
    if ctx.needs_input_grad[1]:
        ctx.uses = step.uses(names[0], weight)
        if vector:
            ctx.uses.count_vector()
        else:
            ctx.uses.count_linear()
    if bias is not None and ctx.needs_input_grad[2]:
        ctx.bias_dtype = bias.dtype
        ctx.bias_uses = step.uses(names[1], bias)
        ctx.bias_uses.count_vector()


class PerSampleDot(ScoredFunction):
    """A parameter as (rows, *shape), a copy for every row: scores whatever is computed with it."""

    @staticmethod
    def forward(ctx, parameter, sink, step, name):  # type: ignore[no-untyped-def]
        ctx.step, ctx.shape, ctx.dtype = step, parameter.shape, parameter.dtype
        ctx.uses = step.uses(name, parameter)
        ctx.uses.count_vector()
        return parameter.expand(step.rows, *parameter.shape)

    @staticmethod
    @without_autocast
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        row_grads = grad_out.reshape(len(grad_out), -1).to(accumulator(grad_out.dtype))
        grad, dots = vector_grad(ctx.step, ctx.uses, row_grads)
        dots = dots if ctx.needs_input_grad[1] else None
        return grad.view(ctx.shape).to(ctx.dtype), dots, None, None


class LinearDot(ScoredFunction):
    """A linear layer; `transposed` when the weight is stored (Din, Dout), as HF Conv1D does."""

    @staticmethod
    def forward(ctx, x, weight, bias, weight_sink, bias_sink, step, names, transposed):  # type: ignore[no-untyped-def]
        w = weight.to(x.dtype)
        sources: tuple[Tensor | None, ...] = ()
        if ctx.needs_input_grad[1]:
            ctx.make_input, sources = made_of(x, weight.shape[1 if transposed else 0])
        ctx.save_for_backward(weight, *sources)
        ctx.transposed = transposed
        note_uses(ctx, step, names, weight, bias, vector=False)
        b = None if bias is None else bias.to(x.dtype)
        flat = x.flatten(0, -2)
        out = F.linear(flat, w.t() if transposed else w, b)
        # No view, which a function's output that is modified in place (an activation) may not be.
        return torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[1]])

    @staticmethod
    @without_autocast
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        weight, *sources = ctx.saved_tensors
        step, result = ctx.step, [None] * 8
        if ctx.needs_input_grad[0]:
            w = weight.to(grad_out.dtype)
            result[0] = grad_out @ (w.t() if ctx.transposed else w)
        grad = step.as_samples(grad_out)
        if ctx.bias_uses is not None:
            row_grads = grad.sum(1, dtype=accumulator(grad.dtype))
            bias_grad, result[4] = vector_grad(step, ctx.bias_uses, row_grads)
            result[2] = bias_grad.to(ctx.bias_dtype)
        if ctx.uses is not None:
            act = step.as_samples(ctx.make_input(*sources))
            if ctx.transposed:  # G_i is (Din, Dout): the same product with the sides swapped
                act, grad = grad, act
            weight_grad, result[3] = linear_grad(step, ctx.uses, act, grad)
            if not ctx.uses.hold(weight_grad):
                result[1] = weight_grad.to(weight.dtype)
        if not ctx.needs_input_grad[3]:
            result[3] = None
        if not ctx.needs_input_grad[4]:
            result[4] = None
        return tuple(result)


class EmbeddingDot(ScoredFunction):
    """An embedding; `same` when the ids were the same for every row, as position ids are."""

    @staticmethod
    def forward(ctx, ids, weight, sink, step, name, padding_idx, same):  # type: ignore[no-untyped-def]
        if same:
            out = F.embedding(ids[0], weight, padding_idx).expand(step.rows, -1, -1)
        else:
            out = F.embedding(ids, weight, padding_idx)
        ids = ids.reshape(step.rows, -1)
        ctx.save_for_backward(ids)
        ctx.step, ctx.dtype = step, weight.dtype
        ctx.uses = step.uses(name, weight)
        ctx.uses.num_embeddings, ctx.uses.padding_idx = weight.shape[0], padding_idx
        ctx.uses.count_embedding(ids)
        return out

    @staticmethod
    @without_autocast
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        (ids,) = ctx.saved_tensors
        grad = ctx.step.as_samples(grad_out)
        ids = ids.reshape(grad.shape[:2])
        weight_grad, dots = _embedding_grad(ctx.step, ctx.uses, ids, grad)
        dots = dots if ctx.needs_input_grad[2] else None
        return None, weight_grad.to(ctx.dtype), dots, None, None, None, None


class LayerNormDot(ScoredFunction):
    """A layer norm with weight and optional bias."""

    @staticmethod
    def forward(ctx, x, weight, bias, weight_sink, bias_sink, step, names, shape, eps):  # type: ignore[no-untyped-def]
        out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.shape = shape
        note_uses(ctx, step, names, weight, bias, vector=True)
        return out

    @staticmethod
    @without_autocast
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        x, mean, rstd, weight, bias = ctx.saved_tensors
        result = [None] * 9
        if ctx.needs_input_grad[0]:
            result[0] = torch.ops.aten.native_layer_norm_backward(
                grad_out.contiguous(), x, ctx.shape, mean, rstd, weight, bias, [True, False, False]
            )[0]
        normed = ((x - mean) * rstd).to(grad_out.dtype)
        normed, grads = (y.flatten(-len(ctx.shape)) for y in (normed, grad_out))
        weight_rows, bias_rows = norm_sample_grads(
            ctx.step.as_samples(normed), ctx.step.as_samples(grads)
        )
        for uses, rows, parameter, at in (
            (ctx.uses, weight_rows, weight, 1),
            (ctx.bias_uses, bias_rows, bias, 2),
        ):
            if uses is not None:
                grad, dots = vector_grad(ctx.step, uses, rows)
                result[at] = grad.view(parameter.shape).to(parameter.dtype)
                result[at + 2] = dots if ctx.needs_input_grad[at + 2] else None
        return tuple(result)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
