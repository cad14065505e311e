"""Given directions: validation gradients held per parameter, that every layer dots with.

A direction is a mapping {parameter name: tensor of the parameter's shape}; the score of sample i is
then ⟨direction, ∇L_i⟩, whatever the direction is: the gradient of a large validation set, computed
every k steps, one of several targets, or one preconditioned by the optimizer's state.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .batches import Batch, LossForm, Rows, read_batch
from .checkpointing import has_reentrant_checkpoint
from .checks.digests import own_buffers
from .checks.mean_loss import check_loss_of_tokens, unnoticed
from .checks.verify import LabelCheck
from .compiling.compiled import numbers
from .compiling.compiler import run_compiled, run_uncompiled
from .errors import GraddotError

Direction = Mapping[str, Tensor]
LossFunction = Callable[[nn.Module, Any, Tensor], Tensor]


def _accumulator(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def stack_directions(
    directions: Mapping[str, Direction],
    parameters: Mapping[str, nn.Parameter],
    covered: Sequence[str],
) -> dict[int, Tensor]:
    """(K, *shape) by id of the parameter, one direction a target, on the parameter's device and
    sharded as it is.

    Raises GraddotError for a covered parameter without direction, a name that is not covered,
    another shape than the parameter's, and numbers that are not finite.
    """
    for target, direction in directions.items():
        missing = [name for name in covered if name not in direction]
        unknown = [name for name in direction if name not in covered]
        if missing or unknown:
            raise GraddotError(
                f"direction {target!r} lacks {missing} and has {unknown}, which are not scored;"
                " expected one tensor for every parameter in coverage().covered"
            )
        for name in covered:
            kind = getattr(direction[name], "dtype", type(direction[name]).__name__)
            if not isinstance(direction[name], Tensor) or not direction[name].is_floating_point():
                raise GraddotError(
                    f"direction {target!r} is of {kind} for {name}; expected a tensor of"
                    " floating-point numbers"
                )
            if direction[name].shape != parameters[name].shape:
                raise GraddotError(
                    f"direction {target!r} has shape {tuple(direction[name].shape)} for {name};"
                    f" expected {tuple(parameters[name].shape)}, the parameter's"
                )
    stacked = {}
    for name in covered:
        p = parameters[name]
        # Parameters and their .grad, or views of them, are written to in place, and zeroed.
        own = [x for x in (p, p.grad) if x is not None]
        parts = [d[name].detach() for d in directions.values()]
        parts = [x.clone() if any(_share_memory(x, y) for y in own) else x for x in parts]
        stacked[id(p)] = distributed.stacked(parts, p, _accumulator(p))
    for name, finite in zip(covered, distributed.are_finite([*stacked.values()]), strict=True):
        if not finite:
            raise GraddotError(f"the direction of {name} has NaN or infinite numbers")
    return stacked


def _share_memory(x: Tensor, y: Tensor) -> bool:
    parts = [distributed.own_part(one).untyped_storage().data_ptr() for one in (x, y)]
    return parts[0] == parts[1]


def direction_norms(stacked: Mapping[int, Tensor]) -> Tensor:
    """Norms over all parameters of `stack_directions`, (K,), fp64."""
    parts = [distributed.own_part(d) for d in stacked.values()]
    parts = [d if d.dim() > 1 else d[:, None] for d in parts]  # of a scalar (K,)
    rows = [torch.linalg.vector_norm(d, dim=-1).double().reshape(len(d), -1) for d in parts]
    squares = [x.square().sum(1).to(rows[0].device) for x in rows]
    squares = distributed.over_shards(squares, [*stacked.values()])
    return torch.stack(squares).sum(0).sqrt()


def batch_loss(model: nn.Module, rows: Rows, loss_fn: LossFunction | None) -> Tensor:
    """loss_fn(model, inputs, labels), or the loss that the model computes from `labels=`."""
    inputs, labels = rows.as_given()
    if loss_fn is not None:
        loss = loss_fn(model, inputs, labels)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            got = f"a {type(loss).__name__}"
            if isinstance(loss, Tensor):
                got = (
                    f"a tensor of shape {tuple(loss.shape)} with requires_grad={loss.requires_grad}"
                )
            raise GraddotError(f"loss_fn returned {got}; expected one number with a gradient")
        return loss
    try:
        args, kwargs = ((inputs,), {}) if rows.is_tensor else ((), {**rows.inputs, **rows.lengths})
        output = model(*args, **kwargs, labels=labels)
    except TypeError as error:
        if "labels" not in str(error):
            raise
        raise GraddotError(f"the model takes no labels ({error}); pass loss_fn") from error
    return _loss_in(output)


class ValidationLoss:
    """Of one batch after the other: the loss, the weight of its gradient, and its labelled tokens.

    What the first batch's loss is made of is seen, uncompiled: whether the model gets the labels, and
    which of them the loss uses; the latter again in the first batch with a label that is counted only
    if the loss does not shift labels.
    """

    def __init__(self, model: nn.Module, form: LossForm, loss_fn: LossFunction | None) -> None:
        self._model, self._form, self._loss_fn = model, form, loss_fn
        self._shift: int | None = None
        self._shift_seen = False
        self._checks: list[LabelCheck] = []

    def __call__(self, batch: Batch) -> tuple[Tensor, float, float]:
        rows = read_batch(batch, "a validation batch")
        tells = self._form.tells_shift(rows.labels)
        if self._shift is None or (tells and not self._shift_seen):
            loss = self._watched(rows)
            self._shift_seen = tells
        else:
            loss = batch_loss(self._model, rows, self._loss_fn)
        count = float(self._form.count(rows.labels, self._shift).sum())
        return loss, count if self._form.reduction == "mean" else 1.0, count

    def _watched(self, rows: Rows) -> Tensor:
        calls: list[tuple[Mapping[str, Any], Any]] = []
        note = lambda module, args, kwargs, output: calls.append((kwargs, output))
        handle, number = self._model.register_forward_hook(note, with_kwargs=True), next(numbers)
        run_uncompiled(number)
        try:
            loss = batch_loss(self._model, rows, self._loss_fn)
        finally:
            run_compiled(number)
            handle.remove()
        labelled = any(kwargs.get("labels") is not None for kwargs, _ in calls)
        own = int(self._form.label_shift == 1)
        self._shift = self._form.shift_by(self._model) if labelled else own
        counts = self._form.count(rows.labels, self._shift)
        summed = lambda by_token: by_token.sum(1)
        self._checks = [
            LabelCheck(output, rows.labels, counts, summed, first=False) for _, output in calls
        ]
        return loss

    def check_rows(self, batch: Batch) -> None:
        """Raise GraddotError unless the loss is that of the batch's rows (`check_loss_of_tokens`)."""
        rows = read_batch(batch, "the batch")
        with unnoticed(), own_buffers(self._model):
            self(batch)  # sees how labels are shifted

        def loss_of(which: Sequence[int]) -> Tensor:
            inputs = {key: x[list(which)] for key, x in rows.inputs.items()}
            part = replace(rows, inputs=inputs, labels=rows.labels[list(which)])
            return batch_loss(self._model, part, self._loss_fn)

        counts = self._form.count(rows.labels, self._shift)
        check_loss_of_tokens(self._model, loss_of, counts, self._form.reduction)

    def check(self) -> None:
        """After a batch's backward, raise GraddotError if its loss was seen not to use the labels that were
        counted: several would be weighted by other numbers than their losses are means of."""
        checks, self._checks = self._checks, []
        for problem in filter(None, (check.problem for check in checks)):
            raise GraddotError(f"in compute_directions, {problem}")


def _loss_in(output: Any) -> Tensor:
    """The loss that a model returned with its output: where Trainer takes it from, or `.loss`."""
    if isinstance(output, Mapping):
        loss = output.get("loss")
    else:
        loss = getattr(output, "loss", None)
        first = output[0] if isinstance(output, (tuple, list)) and output else None
        if isinstance(first, Tensor) and first.dim() == 0:
            if loss is not None and loss is not first:  # a named tuple: which is trained on?
                raise GraddotError(
                    f"the model returned a {type(output).__name__} whose loss is not its first item,"
                    " a number too; put the loss first, or pass loss_fn"
                )
            loss = first
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise GraddotError(
            f"the model returned a {type(output).__name__} without a loss; expected, with labels="
            ' among its arguments, a mapping with "loss", a tuple whose first item is the loss, a'
            " number, or an object with .loss; or pass loss_fn"
        )
    return loss


def mean_gradient(
    parameters: Mapping[str, nn.Parameter],
    covered: Sequence[str],
    batches: Iterable[Any],
    loss_of: ValidationLoss,
    loss_scale: float = 1.0,
) -> dict[str, Tensor]:
    """Gradient of the mean loss over all labelled tokens of the batches, for the covered names.

    loss_of(batch) gives the batch's loss, the weight of its gradient and its labelled tokens. The
    loss is multiplied by loss_scale before its backward, or by less where that overflows. `.grad`
    of all parameters stays as it is. fp32 (fp64 for fp64). Raises GraddotError if there is no
    labelled token, or if a gradient is not finite.
    """
    kept = {name: p.grad for name, p in parameters.items()}
    total = {n: torch.zeros_like(parameters[n], dtype=_accumulator(parameters[n])) for n in covered}
    counts: list[float] = []
    try:
        for batch in batches:
            if counts:  # the gradient of one batch has no weight
                loss_of.check()
            grads, weight, count, loss_scale = _backward(batch, parameters, loss_of, loss_scale)
            for name in covered:
                if (grad := grads.get(name)) is not None:
                    total[name].add_(grad, alpha=weight)
            counts.append(count)
        if len(counts) > 1:
            loss_of.check()
    finally:
        for name, p in parameters.items():
            p.grad = kept[name]
    distributed.check_same_counts(counts, parameters.values())
    tokens = sum(counts)
    if tokens == 0:
        raise GraddotError("the validation batches have no labelled token")
    finite = distributed.are_finite([gradient.div_(tokens) for gradient in total.values()])
    for name, is_finite in zip(total, finite, strict=True):
        if not is_finite:
            raise GraddotError(f"the validation gradient of {name} is not finite")
    return total


def _backward(
    batch: Any,
    parameters: Mapping[str, nn.Parameter],
    loss_of: ValidationLoss,
    scale: float,
) -> tuple[dict[str, Tensor | None], float, float, float]:
    """The scaled gradients by name, their weight, the tokens, and the scale used."""
    while True:
        for p in parameters.values():
            p.grad = None
        loss, weight, count = loss_of(batch)
        grads = _gradients(loss * scale, parameters)
        found = [grad for grad in grads.values() if grad is not None]
        if scale <= 1 or all(distributed.are_finite(found)):
            return grads, weight / scale, count, scale
        scale = max(1.0, scale / 16)


def _gradients(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor | None]:
    """By name, where that can be had without `.grad`: what waits there for a training gradient, as
    an optimizer in the backward or DDP, whose static_graph would take this for its first, is not to
    see it."""
    sharded = distributed.is_sharded(parameters.values())
    if not sharded and not has_reentrant_checkpoint([loss]):
        wanted = {name: p for name, p in parameters.items() if p.requires_grad}
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        # A backward inside of the backward, as of checkpoints by other means, writes to .grad.
        parts = [
            (name, (grad, wanted[name].grad)) for name, grad in zip(wanted, found, strict=True)
        ]
        sums = {name: [x for x in both if x is not None] for name, both in parts}
        return {name: sum(both[1:], both[0]) if both else None for name, both in sums.items()}
    loss.backward()
    grads = {name: p.grad for name, p in parameters.items()}
    if sharded and all(grad is None for grad in grads.values()):
        raise GraddotError(
            "no gradient came to the sharded parameters; call set_requires_gradient_sync(True) on the"
            " model before compute_directions"
        )
    return grads


def adamw_direction(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    direction: Direction,
    gradient: Direction | None = None,
) -> dict[str, Tensor]:
    """The direction whose dots, times lr, predict AdamW's next step instead of SGD's.

    To first order, lr · ⟨result, δ⟩ is how much more the validation loss falls in the coming step
    of `optimizer` if δ is added to its gradient. `gradient` is the training gradient of that step
    (clipped, unscaled) around which the step is linearised; without it, around zero, where entries
    that have had no gradient yet (second moment 0, as of tokens not met so far), and parameters that
    had none in any step, are left out, for there the step is only a sign. Compute it after the last
    optimizer step, before the next.

    parameters names the model's parameters, as `model.named_parameters()` does. Raises
    GraddotError for optimizers other than Adam and AdamW, for amsgrad, maximize and Adam's coupled
    weight decay, and before the first step, when there is no state.
    """
    if not isinstance(optimizer, torch.optim.Adam):
        raise GraddotError(f"the optimizer is a {type(optimizer).__name__}; expected AdamW or Adam")
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    result = {}
    for name, one in direction.items():
        p = parameters[name]
        group = groups.get(id(p))
        if group is None:  # not updated, so nothing that it is scored on can move the loss
            result[name] = torch.zeros_like(one)
            continue
        coupled = group["weight_decay"] and not group.get("decoupled_weight_decay", False)
        if group["amsgrad"] or group["maximize"] or coupled:
            raise GraddotError(
                f"{name} is optimized with amsgrad, maximize or weight decay in the gradient;"
                " expected AdamW without amsgrad and maximize"
            )
        state = optimizer.state.get(p)
        if not state and not any(optimizer.state.values()):
            raise GraddotError(f"the optimizer has no state of {name} yet; take a step first")
        if not state:  # no step had a gradient of it
            zero = torch.zeros_like(one)
            state = {"step": 0.0, "exp_avg": zero, "exp_avg_sq": zero}
        g = torch.zeros_like(one) if gradient is None else gradient[name].to(one)
        result[name] = one * _adam_slope(g, state, group)
    return result


def _adam_slope(g: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """d(m̂ / (√v̂ + eps)) / dg, elementwise, for the optimizer's next step with gradient g."""
    beta1, beta2 = (float(b) for b in group["betas"])
    t = float(state["step"]) + 1
    m_share, v_share = (1 - beta1) / (1 - beta1**t), (1 - beta2) / (1 - beta2**t)
    m = state["exp_avg"].to(g) * (beta1 / (1 - beta1**t)) + m_share * g
    root = (state["exp_avg_sq"].to(g) * (beta2 / (1 - beta2**t)) + v_share * g * g).sqrt()
    below = root + group["eps"]
    slope = m_share / below - v_share * m * (g / root) / below / below
    return torch.where(root == 0, 0, slope)
