"""The language-model head and its loss in one, without the logits of the whole batch.

    graddot_lm.fuse_head(model)                       # a Hugging Face causal language model
    loss = model(input_ids, labels=labels).loss       # as before, in less time and memory

or, in a model of one's own, `linear_cross_entropy(hidden, head, labels)`. With an engine attached
the head is scored like any other layer; without one it is a cheaper head.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from graddot_kernels.fused_head import tokens_at_a_time

from . import distributed
from .autocast import autocast_input
from .compiling.tracing import trace_head
from .errors import GraddotError
from .rules.layers import ScoredFunction, note_uses, vector_grad
from .scored import ScoredForward


@dataclass
class FusedHeadOutput(ModelOutput):
    """What a model with a fused head returns for labels.

    loss: 0-dim. token_losses: (rows, T), detached; position t holds the loss of its own target, 0
    where there is none.
    """

    loss: Tensor | None = None
    token_losses: Tensor | None = None


class LinearCrossEntropyDot(ScoredFunction):
    """coefficient · Σ losses, and the losses. The gradients are made in the forward."""

    @staticmethod
    def forward(ctx, act, weight, bias, labels, coefficient, form, step):  # type: ignore[no-untyped-def]
        weight_needed = ctx.needs_input_grad[1]
        val_rows: list[int] = [] if step is None else step.val_rows
        ctx.step = ctx.uses = ctx.bias_uses = direction = None
        ids = train_ids = labels.new_empty(0)
        own_ids, norms = None, False
        if step is not None:
            note_uses(ctx, step, weight, bias, vector=False)
        if ctx.uses is not None:
            direction = None if ctx.uses.given is None else step.direction(ctx.uses)
            ids, train_ids = ctx.uses.head_ids(labels.device)
            own_ids, norms = ctx.uses.own_ids(), ctx.uses.norms
        scale = coefficient if step is None else coefficient * step.scale
        losses, *results = torch.ops.graddot.linear_cross_entropy(
            act.detach(), weight.detach(), None if bias is None else bias.detach(), labels,
            val_rows, direction, ids, train_ids, *form, scale, weight_needed, own_ids, norms,
        )  # fmt: skip
        ctx.results, ctx.coefficient = results, coefficient
        paired = ids.numel() + train_ids.numel() > 0
        ctx.save_for_backward(act[: act.shape[0] - sum(val_rows)] if paired else None)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum() * coefficient.to(losses.dtype), losses

    @staticmethod
    def backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
        if ctx.results is None:
            raise GraddotError("a second backward through the fused head; run its forward again")
        act_grad, weight_grad, bias_rows, dots, columns, head_rows, own_rows = ctx.results
        ctx.results, step = None, ctx.step
        result = [None] * 7
        # A factor of 1, the usual one, needs no pass over the table; a GPU's is not worth a wait,
        # and a graph has no branches.
        known = not (grad_loss.is_cuda or torch.compiler.is_compiling())
        unscaled = known and float(grad_loss) == 1
        factor = grad_loss * ctx.coefficient.to(grad_loss.dtype)
        if ctx.needs_input_grad[0]:
            result[0] = act_grad.mul_(factor)
        if ctx.uses is not None:
            # Val rows that ride along have their gradients scaled like the training rows', and
            # norms are of these.
            given = 0 if ctx.uses.given is None else len(ctx.uses.given)
            dots = dots.double() * factor.double()
            dots[given:] *= factor.double()
            part = ctx.saved_tensors[0], columns * factor, head_rows * factor, own_rows * factor
            ctx.uses.head_terms(*part)
            step.collect(ctx.uses.leaf, dots)
        if ctx.needs_input_grad[1]:
            weight_grad = weight_grad if unscaled else weight_grad.mul_(grad_loss)
            if ctx.uses is None or not ctx.uses.hold(weight_grad):
                result[1] = weight_grad.to(ctx.dtypes[0])
        if ctx.needs_input_grad[2]:
            rows = bias_rows * factor
            bias_grad = rows.sum(0)
            if ctx.bias_uses is not None:
                bias_grad = vector_grad(step, ctx.bias_uses, rows)
            result[2] = bias_grad.to(ctx.dtypes[1])
        return tuple(result)


def _check_labels(hidden: Tensor, head: nn.Linear, labels: Tensor, ignore_index: int) -> None:
    width = head.weight.shape[1]
    if hidden.dim() != 3 or labels.shape != hidden.shape[:2] or hidden.shape[2] != width:
        raise GraddotError(
            f"hidden has shape {tuple(hidden.shape)} and labels {tuple(labels.shape)}; expected"
            f" (rows, T, {width}), the head's width, and (rows, T)"
        )
    if labels.is_cuda:  # the kernel makes the loss NaN instead: a check would wait for the device
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= head.weight.shape[0]))
    if torch.compiler.is_compiling():  # a graph has no branches
        torch._assert_async(~wrong.any(), "a label is no token of the fused head")
        return
    if wrong.any():
        row, t = wrong.nonzero()[0].tolist()
        raise GraddotError(
            f"label {int(labels[row, t])} at row {row}, position {t} is no token of the head's"
            f" {head.weight.shape[0]}; the label to be ignored is {ignore_index}"
        )


def linear_cross_entropy(
    hidden: Tensor,
    head: nn.Linear,
    labels: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    num_labels: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `head(hidden)` with labels, chunked: the logits never exist as a whole.

    hidden (rows, T, d), any float dtype (16-bit under autocast); head a Linear of (vocab, d), whose
    weight may be an embedding's too; labels (rows, T) int64, labels[:, t] the target of position t
    (shifted already), `ignore_index` for none. Returns the loss, 0-dim, the mean over labelled
    tokens ("mean"; over `num_labels` if given) or their sum ("sum"), and the losses (rows, T),
    detached, fp32 (fp64 for fp64). A token's loss is that of `torch.nn.functional.cross_entropy`
    with `label_smoothing`, plus z_loss · (log Σ exp logits)².

    The gradients are made in the forward, at once with the logits' only appearance; the backward
    scales them, and runs once. With a `GradDotProdEngine` attached the weight's dots are among
    them. Raises GraddotError for labels that are no tokens and shapes that do not fit.
    """
    if reduction not in ("mean", "sum"):
        raise GraddotError(f"reduction is {reduction!r}; expected 'mean' or 'sum'")
    options = reduction, ignore_index, float(label_smoothing), float(z_loss)
    if torch.compiler.is_compiling():
        forward = getattr(head, "forward", None)
        if isinstance(forward, ScoredForward) and forward.model_forward.scoring():
            return trace_head(forward, hidden, labels, num_labels, *options)
    return cross_entropy(hidden, head, labels, num_labels, *options)


def cross_entropy(
    hidden: Tensor,
    head: nn.Linear,
    labels: Tensor,
    num_labels: Tensor | int | None,
    reduction: str,
    *form: Any,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy`, outside of a compiled graph."""
    distributed.unshard(head)  # one that is sharded by itself, since it is not called
    _check_labels(hidden, head, labels, form[0])
    labelled = labels != form[0]
    mean = reduction == "mean" and num_labels is None
    scored = getattr(head.__dict__.get("forward"), "graddot_head", None)
    step = scored(labelled, mean) if scored is not None and torch.is_grad_enabled() else None
    if step is not None:
        name = head.__dict__["forward"].name
        if hidden.shape[0] == hidden.shape[1] and "second" in step.layouts.values():
            raise GraddotError(
                f"the head {name} got as many tokens as rows, {hidden.shape[0]}, in a model that has"
                " the rows as the second dimension elsewhere; use another number of rows"
            )
        hidden = step.as_rows(name, hidden)
    coefficient = torch.ones((), dtype=torch.float64, device=hidden.device)
    if reduction == "mean":
        total = labelled.sum().clamp(min=1) if num_labels is None else num_labels
        coefficient = coefficient / total
    act = autocast_input(hidden)
    if act.dtype == torch.float16:  # p - 1[label] of a large vocabulary is below fp16's range
        act = act.float()
    if not torch.is_grad_enabled() or (step is not None and step.trial):
        losses = _losses(act, head, labels, form)
        distributed.reshard(head)  # for which no backward comes
        return losses.sum() * coefficient.to(losses.dtype), losses
    shape = labels.shape
    if step is not None and step.tokens is not None:  # each a row of its own
        act, labels = act.reshape(-1, 1, act.shape[2]), labels.reshape(-1, 1)
    loss, losses = LinearCrossEntropyDot.apply(
        act, head.weight, head.bias, labels, coefficient, form, step
    )
    return loss, losses.view(shape)


@torch.no_grad()
def _losses(act: Tensor, head: nn.Linear, labels: Tensor, form: Any) -> Tensor:
    """Evaluation: some tokens at a time, no gradients; a packed batch is one row of many."""
    weight = head.weight.to(act.dtype)
    bias = None if head.bias is None else head.bias.to(act.dtype)
    with torch.autocast(act.device.type, enabled=False):
        size = tokens_at_a_time(act, len(weight))
        chunks = zip(act.flatten(0, 1).split(size), labels.flatten().split(size), strict=True)
        parts = [
            torch.ops.graddot.cross_entropy_grad(nn.functional.linear(x, weight, bias), y, *form)
            for x, y in chunks
        ]
    return torch.cat(parts).view(labels.shape)


class _FusedForward:
    """A causal language model's forward: the fused head where there are labels."""

    def __init__(self, model: nn.Module, label_shift: int, **options: Any) -> None:
        self.model: Any = model
        self.original = model.forward
        self.__signature__ = inspect.signature(model.forward)  # by which Trainer drops columns
        self.label_shift, self.in_evaluation, self.options = label_shift, True, options

    def __call__(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return self.original(*args, **kwargs)
        evaluates = not (self.model.training or torch.is_grad_enabled())
        # Trainer says skip_logits with use_liger_kernel, where the loss alone is wanted.
        if not kwargs.pop("skip_logits", False) and evaluates and not self.in_evaluation:
            return self.original(*args, labels=labels, **kwargs)
        kwargs.pop("return_dict", None)
        num_labels = kwargs.pop("num_items_in_batch", None)
        shifted, ignored = kwargs.pop("shift_labels", None), kwargs.pop("ignore_index", -100)
        if shifted is not None or ignored != -100:
            given = f"ignore_index={ignored}" if shifted is None else "shift_labels"
            raise GraddotError(
                f"the model with a fused head got {given}, which the fused head does not take: its loss"
                " is that of labels, with -100 where there is none. Give it these, unfuse_head the"
                " model, or call linear_cross_entropy"
            )
        config, routers = self.model.config, kwargs.get("output_router_logits")
        config = getattr(config, "text_config", config)  # of a model that sees, too
        routers = getattr(config, "output_router_logits", False) if routers is None else routers
        coefficient = getattr(config, "router_aux_loss_coef", 1)
        if routers and getattr(self.model, "router_aux_loss_coef", coefficient) != 0:
            raise GraddotError(
                "the model's own loss has the auxiliary loss of its routers in it (output_router_logits),"
                " which compares samples and is not the fused head's; make the model with router_aux_loss_coef=0,"
                " or set output_router_logits=False"
            )
        hidden = self.model.base_model(*args, **kwargs)[0]
        if self.label_shift:
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        head = self.model.get_output_embeddings()
        loss, losses = linear_cross_entropy(
            hidden, head, labels.to(hidden.device), num_labels=num_labels, **self.options
        )
        return FusedHeadOutput(loss=loss, token_losses=losses)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_FusedForward":
        copied = _FusedForward(memo[id(self.model)], self.label_shift, **self.options)
        copied.in_evaluation = self.in_evaluation
        return copied


def fuse_head(
    model: nn.Module,
    *,
    label_shift: int = 1,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    in_evaluation: bool = True,
) -> nn.Module:
    """Give a Hugging Face causal language model the fused head; returns the model.

    `model(input_ids, labels=labels)` then returns a `FusedHeadOutput`; without labels nothing
    changes. label_shift is 1 when labels[t] is the token at position t, as Hugging Face has it,
    and 0 when it is that position's target. With in_evaluation=False the model is as it was after
    `model.eval()` under `torch.no_grad()`, and returns its logits, as a Trainer's compute_metrics
    wants. `unfuse_head` takes it back.

    Raises GraddotError unless the model is a base model and a Linear head, and its own loss, on a
    few tokens, is what the fused head computes (a model may scale or cap its logits); also for a
    model that `fully_shard` had before.
    """
    if distributed.is_sharded(model.parameters()):  # whose forward runs in hooks, not by itself
        raise GraddotError("the model is sharded already; call fuse_head before fully_shard")
    if hasattr(model, "get_base_model"):  # of peft, around the language model
        fuse_head(
            model.get_base_model(),  # type: ignore[operator]
            label_shift=label_shift,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            in_evaluation=in_evaluation,
        )
        return model
    get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    base = getattr(model, "base_model", model)
    if type(get_head()) is not nn.Linear or base is model:
        raise GraddotError(
            f"{type(model).__name__} is not a base model with a Linear head; call"
            " linear_cross_entropy on its last hidden states instead"
        )
    if isinstance(model.__dict__.get("forward"), _FusedForward):
        raise GraddotError("the model has a fused head already")
    fused = _FusedForward(model, 1)
    weight = get_head().weight
    ids = torch.arange(8, device=weight.device)[None] % min(weight.shape)
    training = model.training
    with torch.no_grad():
        model.eval()
        pairs = [(fused.original(ids, labels=ids).loss, fused(ids, labels=ids).loss)]
        pairs += _losses_of_large_logits(fused, ids)
        model.train(training)
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 2e-2
    for want, got in pairs:
        if not torch.allclose(got.double(), want.double(), rtol=tolerance, atol=tolerance):
            raise GraddotError(
                f"{type(model).__name__} computes another loss ({want:.6g}) than cross-entropy of its"
                f" head's logits ({got:.6g}); its head cannot be fused"
            )
    fused.label_shift, fused.in_evaluation = label_shift, in_evaluation
    fused.options = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    model.forward = fused  # type: ignore[method-assign]
    return model


def _losses_of_large_logits(fused: _FusedForward, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The model's own loss with logits of around 100 in place of its head's, and their cross-entropy: a
    cap changes next to nothing in those of new weights. None of a model that does not call its head."""
    made: list[Tensor] = []

    def large(head: nn.Module, args: Any, out: Tensor) -> Tensor:
        random = torch.Generator().manual_seed(0)
        made.append((100 * torch.randn(out.shape, generator=random, device="cpu")).to(out))
        return made[-1]

    handle = fused.model.get_output_embeddings().register_forward_hook(large)
    try:
        loss = fused.original(ids, labels=ids).loss
    finally:
        handle.remove()
    got = [nn.functional.cross_entropy(x[0, :-1].double(), ids[0, 1:]) for x in made]
    return [(loss, x) for x in got]


def unfuse_head(model: nn.Module) -> None:
    """Give the model its own forward back."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    if not isinstance(model.__dict__.get("forward"), _FusedForward):
        raise GraddotError("the model has no fused head")
    del model.__dict__["forward"]
