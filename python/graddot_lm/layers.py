"""Layers whose backward also gives every training sample's dot product with the val gradient.

The functions replace a layer's forward while a step is active. The weight gradient that they return
is that of the training rows, in the scale of training alone; the dots, (K, N) a use of a parameter,
are collected by the step, which adds them up. Rows of the joint batch come first in every
activation: N training rows, then val_rows[k] rows of target k.

What a step does for every layer is paid for in time of the host as much as of the device: a GPU
runs through a small layer faster than it can be told to. So dots are not added one by one, and those
of biases and norms, which are small, are made for many parameters at once.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graddot_kernels.sample_dots import bordered

from .errors import GraddotError
from .recompute import made_of
from .shared_uses import SharedUses, vector_form

_ops = torch.ops.graddot

_DOTS_TOGETHER = 32  # dots of as many uses are added up at once
_ROWS_TOGETHER = 2**20  # elements of row gradients that wait to be dotted together


@dataclass
class Step:
    """One micro-batch: what the layers need to know about the rows that run through them.

    scale is M / n_train (0-dim): it turns the training rows' part of the joint loss's gradient
    into the gradient of the training loss. names has the layers' parameters by id(parameter), and
    leaf_of what their dots are collected for; a parameter without a leaf is trained but not scored.
    With given directions, (K, *shape) by id(parameter), there are no val_rows; with `tokens`, T,
    every token of a row is then scored as a sample of its own, and dots are (K, N·T); `packed` says
    that tokens are scored as parts of several samples in a row. With `norms`
    dots have one more row, ‖G_i‖², and with val_rows one more column, ‖D_k‖². layouts says by layer
    name how its input holds the rows, as `rows.find_layouts` saw it; first is True in the step that
    saw it; expands has the layers that return for all rows at once, in copies for each. A trial has
    no backward, and `moved` in it says in which rows what these layers return is moved a little, to
    see whom it reaches. buffers gives the model's, which are no rows, and counts has the rows' labelled
    tokens, if known. Of sharded weights a layer's backward may only use its own.
    """

    rows: int
    val_rows: list[int]
    scale: Tensor
    names: dict[int, str] = field(default_factory=dict)
    leaf_of: dict[int, str] = field(default_factory=dict)
    directions: dict[int, Tensor] = field(default_factory=dict)
    tokens: int | None = None
    packed: bool = False
    sharded: bool = False
    layouts: dict[str, str | int] = field(default_factory=dict)
    first: bool = False
    norms: bool = False
    trial: bool = False
    buffers: Callable[[], Iterable[Tensor]] = tuple
    moved: tuple[slice, Collection[str]] | None = None
    expands: set[str] = field(default_factory=set)
    counts: Tensor | None = None
    in_backward: bool = False  # of which there were dots, and which is not through
    shared: dict[int, SharedUses] = field(default_factory=dict)
    _dots: dict[str, list[Tensor]] = field(default_factory=dict)
    _rows: dict[str, list[Tensor]] = field(default_factory=dict)
    _held: int = 0  # elements of _rows
    _scales: Tensor | None = None
    _buffers: dict[int, Tensor] | None = None  # which keeps them, so that no id is another's

    def is_buffer(self, x: Tensor) -> bool:
        """Whether a tensor was one of the model's buffers when this step first asked."""
        if self._buffers is None or self.trial:  # whose runs have copies, each its own
            self._buffers = {id(buffer): buffer for buffer in self.buffers()}
        return id(x) in self._buffers

    @property
    def train_rows(self) -> int:
        return self.rows - sum(self.val_rows)

    def scales(self, rows: int, dtype: torch.dtype) -> Tensor:
        """scale once a training row, (rows,): with it their scaled sum is one operation."""
        if self._scales is None or len(self._scales) != rows or self._scales.dtype != dtype:
            self._scales = self.scale.to(dtype).repeat(rows)
        return self._scales

    def collect(self, leaf: str | None, dots: Tensor) -> None:
        """Dots of one use of a parameter."""
        self._note_backward()
        if leaf is not None:
            self.add(leaf, dots)

    def add(self, leaf: str, dots: Tensor) -> None:
        """Dots of a leaf, whose backward is through."""
        found = self._dots.setdefault(leaf, [])
        found.append(dots)
        if len(found) == _DOTS_TOGETHER:
            found[:] = [torch.stack(found).sum(0, dtype=torch.float64)]

    def collect_rows(self, leaf: str | None, row_grads: Tensor, *, borrowed: bool) -> None:
        """Row gradients (rows, d) of a vector, whose dots are made with those of others: copied if
        they are borrowed and somebody else may write there until then."""
        self._note_backward()
        if leaf is None:
            return
        if row_grads.numel() > _ROWS_TOGETHER:
            self._dot_rows(leaf, row_grads)
            return
        found = self._rows.setdefault(leaf, [])
        found.append(row_grads.clone() if borrowed else row_grads)
        self._held += row_grads.numel()
        if self._held > _ROWS_TOGETHER:
            self.dot_held_rows()

    def dot_held_rows(self) -> None:
        """Make the dots of all row gradients that wait for it."""
        for leaf, found in self._rows.items():
            self._dot_rows(leaf, found[0] if len(found) == 1 else torch.cat(found, 1))
        self._rows, self._held = {}, 0

    def _dot_rows(self, leaf: str, row_grads: Tensor) -> None:
        with no_autocast(row_grads.device.type):  # the caller may be in it, after the backward too
            self.add(leaf, vector_form(row_grads, row_grads, self.val_rows, self.norms))

    def _note_backward(self) -> None:
        """One that raises leaves a part of the dots behind, and `in_backward`."""
        if not self.in_backward:
            self.in_backward = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self.in_backward = False

    def collected(self, leaf: str) -> Tensor | None:
        """The sum of all dots collected for a leaf, fp64; None where there are none."""
        found = self._dots.get(leaf)
        if not found:
            return None
        return (
            found[0].double() if len(found) == 1 else torch.stack(found).sum(0, dtype=torch.float64)
        )

    @property
    def has_dots(self) -> bool:
        return bool(self._dots or self._rows)

    def of_tokens(self) -> "Step":
        """The same step to a layer that gets the tokens of the packed row as rows."""
        assert self.tokens is not None
        return replace(self, rows=self.tokens, tokens=None, packed=False, layouts={})

    def as_samples(self, x: Tensor) -> Tensor:
        """(rows, ..., D) as (samples, T, D): a sample is a row, or with `tokens` a token."""
        if self.tokens is not None:
            if not self.packed:
                return x.reshape(-1, 1, x.shape[-1])
            # Where heads are, they may be behind the tokens or before.
            at = [k for k in (1, 2) if k < x.dim() - 1 and x.shape[k] == self.tokens]
            if x.shape[0] == 1 and len(at) == 1:
                return x.movedim(at[0], 0).reshape(self.tokens, -1, x.shape[-1])
        # Of a packed row in which that is no token, `check_samples` says so.
        return x.reshape(self.rows, -1, x.shape[-1])

    def check_samples(self, name: str, samples: int) -> None:
        if self.tokens is not None and samples != self.rows * self.tokens:
            if self.packed:
                raise GraddotError(
                    f"{name} is used otherwise than on the {self.tokens} tokens of the packed row, one"
                    " after the other, so that its samples have no parts of their own there; give"
                    " every sample a row of its own, or exclude the parameter"
                )
            raise GraddotError(
                f"{name} is used on {samples} tokens of {self.rows} rows; expected {self.tokens} a"
                " row, as there are labels. Scores by token need every layer to see every token;"
                " leave per_token out, or exclude the parameter"
            )

    def uses(self, parameter: Tensor) -> SharedUses:
        key = id(parameter)
        found = self.shared.get(key)
        if found is None:
            if key not in self.names:
                raise GraddotError(
                    f"a rule used a parameter of shape {tuple(parameter.shape)} that its layer does"
                    " not hold; a rule scores the parameters of its own module"
                )
            direction = self.directions.get(key)
            scored = bool(self.val_rows) or direction is not None
            found = self.shared[key] = SharedUses(
                self.names[key], self.val_rows, direction, self.norms and scored,
                self.leaf_of.get(key),
            )  # fmt: skip
        return found

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
        direction = uses.direction()
        direction = direction.reshape(len(direction), -1)  # of a scalar, too
        dots = direction.to(row_grads.dtype) @ row_grads.t()
        step.collect(uses.leaf, bordered(dots, row_grads.square().sum(1)) if uses.norms else dots)
    return torch.mv(train.t(), step.scales(len(train), train.dtype))


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
        direction = uses.direction().flatten(2)  # a convolution's has its kernel's dimensions
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
    if dots is not None:
        step.collect(uses.leaf, dots)
    return weight_grad


def no_autocast(kind: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast off for a kind of device. Entering its context costs more than some layers."""
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def without_autocast(backward):  # type: ignore[no-untyped-def]
    """Backward under an autocast region that the caller left open: dots must not be rounded."""

    @functools.wraps(backward)
    def wrapped(ctx, grad_out):  # type: ignore[no-untyped-def]
        with no_autocast(grad_out.device.type):
            return backward(ctx, grad_out)

    return wrapped


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
        w = weight.to(x.dtype)
        sources: tuple[Tensor | None, ...] = ()
        if ctx.needs_input_grad[1]:
            ctx.make_input, sources = made_of(x, weight.shape[1 if transposed else 0])
        ctx.save_for_backward(weight, *sources)
        ctx.transposed = transposed
        note_uses(ctx, step, weight, bias, vector=False)
        b = None if bias is None else bias.to(x.dtype)
        flat = x.flatten(0, -2)
        out = F.linear(flat, w.t() if transposed else w, b)
        # No view, which a function's output that is modified in place (an activation) may not be.
        return torch.ops.aten._unsafe_view.default(out, [*x.shape[:-1], out.shape[1]])

    @staticmethod
    @without_autocast
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        weight, *sources = ctx.saved_tensors
        step, result = ctx.step, [None] * 5
        grad = step.as_samples(grad_out)
        if ctx.bias_uses is not None:
            row_grads = grad.sum(1, dtype=accumulator(grad.dtype))
            result[2] = vector_grad(step, ctx.bias_uses, row_grads).to(ctx.bias_dtype)
        if ctx.uses is not None:
            act = step.as_samples(ctx.make_input(*sources))
            if ctx.transposed:  # G_i is (Din, Dout): the same product with the sides swapped
                act, grad = grad, act
            weight_grad = linear_grad(step, ctx.uses, act, grad)
            del act, grad  # an input made again goes before the gradient of its size comes
            if not ctx.uses.hold(weight_grad):
                result[1] = weight_grad.to(weight.dtype)
        if ctx.needs_input_grad[0]:
            w = weight.to(grad_out.dtype)
            result[0] = grad_out @ (w.t() if ctx.transposed else w)
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
        if ctx.needs_input_grad[0]:
            result[0] = torch.ops.aten.native_layer_norm_backward(
                grad_out.contiguous(), x, ctx.shape, mean, rstd, weight, bias, [True, False, False]
            )[0]
        samples, grads = (ctx.step.as_samples(y.flatten(-len(ctx.shape))) for y in (x, grad_out))
        statistics = (ctx.step.as_samples(y.flatten(-len(ctx.shape))) for y in (mean, rstd))
        weight_rows, bias_rows = _ops.norm_sample_grads(
            samples, grads, *(y.reshape(samples.shape[:2]) for y in statistics)
        )
        for uses, rows, parameter, at in (
            (ctx.uses, weight_rows, weight, 1),
            (ctx.bias_uses, bias_rows, bias, 2),
        ):
            if uses is not None:
                grad = vector_grad(ctx.step, uses, rows)
                result[at] = grad.view(parameter.shape).to(parameter.dtype)
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


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
