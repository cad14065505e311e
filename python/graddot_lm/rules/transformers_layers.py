"""Rules for three shapes of layer in transformers: experts in one module, of some tokens each or of
all, and relative position biases.

They are known by what they hold, so that every model family's class is served. Experts are 3-d
weights in a module that gets all tokens and their routing; each expert sees a token subset, and
which sample a token is of is followed through the sorting. Llama 4's see all tokens, one expert's
after the other's, multiplied by their scores. A relative position bias is an embedding of (Tq, Tk)
bucket numbers, the same for every sample, so each sample gets its own table.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from graddot_kernels.sample_dots import bordered
from graddot_kernels.torch_impl import mm

from ..autocast import autocast_input, no_autocast, without_autocast
from ..errors import GraddotError
from ..scored import Scored, own_parameters
from ..step import Step
from .layers import ScoredFunction, accumulator, weight_grad_dot

# How many times an expert's tokens rows of one length may be, before a product with the direction for
# every token is less work.
_MOST_FILLED = 2
_FEW = 3  # experts, of which one may get all of a row's tokens


class ExpertLinearDot(ScoredFunction):
    """One linear layer an expert: tokens (S, Din) sorted by expert, weight (E, Dout, Din), or
    (E, Din, Dout) transposed.

    counts: tokens of each expert, adding up to S. samples (S,): the row each token is of. view makes
    the weight of a parameter that is stored another way, and so of its gradient and directions.
    """

    @staticmethod
    def forward(ctx, x, parameter, step, transposed, counts, samples, view):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, parameter, samples)
        ctx.step, ctx.counts, ctx.transposed, ctx.view = step, counts, transposed, view
        ctx.uses = step.uses(parameter) if parameter.requires_grad else None
        weight = view(parameter)
        by_expert = weight.to(x.dtype) if transposed else weight.to(x.dtype).mT
        return _times_expert(x, by_expert, counts)

    @staticmethod
    @without_autocast
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        x, parameter, samples = ctx.saved_tensors
        step, weight, result = ctx.step, ctx.view(parameter), [None] * 7
        split = lambda t: t.split(ctx.counts)
        if ctx.needs_input_grad[0]:
            by_expert = weight.to(grad_out.dtype)
            by_expert = by_expert.mT if ctx.transposed else by_expert
            result[0] = _times_expert(grad_out, by_expert, ctx.counts)
        if not ctx.needs_input_grad[1]:
            return tuple(result)
        uses = ctx.uses
        if uses.linear_calls or uses.vector_calls or uses.embedding_ids or uses.expert_calls:
            raise GraddotError(f"{uses.name}: experts that are used more than once are not scored")
        uses.expert_calls += 1
        step.check_samples(uses.name, step.rows)
        high = accumulator(x.dtype)
        n = step.train_rows
        given = None if uses.given is None else ctx.view(step.direction(uses))
        targets = len(step.val_rows) if given is None else len(given)
        dots = torch.zeros(targets, step.rows, dtype=high, device=x.device)
        norms, val_norms = dots.new_zeros(step.rows), dots.new_zeros(targets)
        scored = bool(step.val_rows) or given is not None
        result[1] = torch.zeros_like(parameter)
        weight_grad = ctx.view(result[1])
        for e, (act, grad, rows) in enumerate(
            zip(*map(split, (x, grad_out, samples)), strict=True)
        ):
            if rows.numel():
                if ctx.transposed:  # G_i is (Din, Dout): the same product with the sides swapped
                    act, grad = grad, act
                act, grad = act.to(high), grad.to(high)
                by_row = _laid_out(act, grad, rows, step.rows) if scored else None
                if by_row is not None:
                    of_expert = None if given is None else given[:, e]
                    weight_grad[e], own = weight_grad_dot(
                        step.val_rows, of_expert, uses.norms, *by_row, step.scale
                    )
                    step.collect(uses.leaf, own)
                    continue
                directions = _directions(step, act, grad, rows) if given is None else given[:, e]
                train = rows < n
                act, grad, rows = act[train], grad[train], rows[train]
                if uses.norms:
                    norms[:n] += _squares(act, grad, rows, n)
                    if given is None:
                        val_norms += torch.stack([d.square().sum() for d in directions])
                for k, direction in enumerate(directions):
                    per_token = (mm(act, direction.to(high).t()) * grad).sum(1)
                    dots[k].index_add_(0, rows, per_token)
                weight_grad[e] = mm(grad.t(), act) * step.scale
        dots = dots[:, :n]
        if uses.norms:
            dots = bordered(dots, norms[:n], val_norms if given is None else None)
        step.collect(uses.leaf, dots)
        return tuple(result)


def _times_expert(x: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """x (S, D) sorted by expert, each of whose tokens by its own of weights (E, D, D')."""
    out = x.new_empty(len(x), weights.shape[2])
    for tokens, weight, own in zip(x.split(counts), weights, out.split(counts), strict=True):
        mm(tokens, weight, own)
    return out


def _laid_out(act: Tensor, grad: Tensor, rows: Tensor, number: int) -> tuple[Tensor, Tensor] | None:
    """One expert's tokens by row, (number, T, D), filled up with zeros; None if most would be that."""
    counts = torch.bincount(rows, minlength=number)
    longest = int(counts.max())
    if number * longest > _MOST_FILLED * len(rows):
        return None
    first = counts.cumsum(0) - counts  # a row's tokens come one after the other
    at = torch.arange(len(rows), device=rows.device) + (rows * longest - first[rows])
    act, grad = (
        x.new_zeros(number * longest, x.shape[1]).index_copy_(0, at, x) for x in (act, grad)
    )
    return act.unflatten(0, (number, longest)), grad.unflatten(0, (number, longest))


def _squares(act: Tensor, grad: Tensor, rows: Tensor, n: int) -> Tensor:
    """‖G_i‖² of one expert's training tokens, (n,); a row's tokens come one after the other."""
    counts = torch.bincount(rows, minlength=n).tolist()
    parts = zip(act.split(counts), grad.split(counts), strict=True)
    return torch.stack([((a @ a.t()) * (b @ b.t())).sum() for a, b in parts])


def _directions(step: Step, act: Tensor, grad: Tensor, rows: Tensor) -> list[Tensor]:
    """One expert's gradient (Dout, Din) of every target's val rows."""
    start, directions = step.rows - sum(step.val_rows), []
    for count in step.val_rows:
        val = (rows >= start) & (rows < start + count)
        directions.append(mm(grad[val].t(), act[val]))
        start += count
    return directions


def is_experts(module: nn.Module) -> bool:
    """Experts as `use_experts_implementation` of transformers defines them."""
    gated, biased = getattr(module, "has_gate", None), getattr(module, "has_bias", None)
    activation = "_apply_gate" if gated else "act_fn"
    if not hasattr(module, activation) or not hasattr(module, "is_transposed"):
        return False
    names = {"gate_up_proj" if gated else "up_proj", "down_proj"}
    names |= {f"{name}_bias" for name in names} if biased else set()
    return {name for name, _ in module.named_parameters()} == names


def is_adapted_experts(module: nn.Module) -> bool:
    """An adapter of peft that adds low-rank products to one of the experts' weights while its forward
    runs (LoRA's `target_parameters`). One for another weight may be inside of it."""
    names = ("parameter_name", "get_base_layer", "lora_A", "lora_B")
    return all(hasattr(module, name) for name in names) and is_experts(module.get_base_layer())  # type: ignore[operator]


def _low_rank(module: Any) -> tuple[Any, dict[str, list[tuple[Tensor, Tensor, float]]]]:
    """The experts inside of their adapters; by weight what is added: lora_A, lora_B and a factor."""
    added: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
    while hasattr(module, "parameter_name"):
        for name in () if module.disable_adapters or module.merged else module.active_adapters:
            if name in module.lora_A:
                pair = module.lora_A[name].weight, module.lora_B[name].weight
                added.setdefault(module.parameter_name, []).append((*pair, module.scaling[name]))
        module = module.base_layer
    return module, added


def experts(
    module: Any, scored: Scored, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """hidden (rows·T, H) or (rows, T, H), the others (rows·T, k)."""
    module, added = _low_rank(module)
    # Older versions of transformers do not have these attributes.
    if getattr(module, "_is_expert_parallel", False) or getattr(
        module, "has_post_expert_norm", False
    ):
        raise GraddotError(f"layer {scored.name}: expert parallelism and post norms have no rule")
    rows = scored.step.as_rows(scored.name, hidden)
    flat = autocast_input(rows.flatten(0, -2))
    number = module.down_proj.shape[0]
    chosen = top_k_index.flatten()
    order = chosen.argsort(stable=True)
    token = order // top_k_index.shape[-1]
    counts = torch.bincount(chosen, minlength=number).tolist()
    if len(counts) > number:
        raise GraddotError(
            f"layer {scored.name}: tokens are routed to experts that it does not hold"
        )
    samples = token // (flat.shape[0] // scored.rows)

    def product(x: Tensor, parameter: Tensor, view: Any, transposed: bool = False) -> Tensor:
        routed = scored.step, transposed, counts, samples
        return ExpertLinearDot.apply(x, parameter, *routed, view)  # type: ignore[no-any-return]

    def linear(x: Tensor, weight: str) -> Tensor:
        x = autocast_input(x)
        w, bias = getattr(module, weight), getattr(module, f"{weight}_bias", None)
        if added and not w.requires_grad:
            w = w.data  # which peft's forward, as a check runs it, sets anew to the same values
        with no_autocast(x.device.type):
            out = product(x, w, lambda w: w, module.is_transposed)
            for a, b, factor in added.get(weight, ()):  # (E·r, Din), and (Dout, r·E): E counts last
                low = product(x, a, lambda a: a.unflatten(-2, (number, -1)))
                wide = lambda b: b.unflatten(-1, (-1, number)).movedim(-1, -3)
                out = out + factor * product(low, b, wide)
            if bias is None:
                return out  # type: ignore[no-any-return]
            # Every row looks up as many experts' biases; they are added in the experts' order.
            biases = scored.embedding_of_rows(chosen.unflatten(0, (scored.rows, -1)), bias)
            return out + biases.flatten(0, 1)[order].to(out.dtype)  # type: ignore[no-any-return]

    if module.has_gate:
        inner = module._apply_gate(linear(flat[token], "gate_up_proj"))
    else:
        inner = module.act_fn(linear(flat[token], "up_proj"))
    out = linear(inner, "down_proj") * top_k_weights.flatten()[order, None]
    return (
        torch.zeros_like(hidden)
        .view_as(flat)
        .index_add(0, token, out.to(hidden.dtype))
        .view(hidden.shape)
    )


def few_experts(module: Any, args: Any, kwargs: Any) -> tuple[nn.Module, tuple[Any, Any]] | None:
    """The same layer of a few of its experts, and arguments by which tokens are routed to those: what its
    forward does with them it does with all, and a proof holds many float64 copies of a layer. None where it
    cannot be made, or would be no smaller."""
    sizes = {p.shape[0] for p in module.parameters()}
    own = getattr(module.forward, "own_forward", module.forward)  # where it is a scored layer's
    plain = getattr(own, "__func__", None) is type(module).forward
    if not plain or sizes != {getattr(module, "num_experts", None)} or max(sizes) <= _FEW:
        return None
    few = copy.copy(module)
    few.__dict__.pop("forward", None)
    few._parameters = {
        name: nn.Parameter(p.detach()[:_FEW], p.requires_grad)
        for name, p in module._parameters.items()
    }
    few.num_experts, number = _FEW, module.num_experts

    def routed(x: Tensor) -> Tensor:
        # An index beyond the last expert is of what is masked.
        return x if x.is_floating_point() else torch.where(x < number, x % _FEW, _FEW)

    return few, tree_map_only(Tensor, routed, (args, kwargs))


def is_experts_of_all(module: nn.Module) -> bool:
    """Experts that are given every token, (E·rows·T, H) and nothing else, by the layer around them."""
    named = dict(module.named_parameters())
    if named.keys() != {"gate_up_proj", "down_proj"} or any(p.dim() != 3 for p in named.values()):
        return False
    alone = len(inspect.signature(type(module).forward).parameters) == 2  # self, and the tokens
    return alone and hasattr(module, "act_fn") and not hasattr(module, "is_transposed")


def is_mixture_of_all(module: nn.Module) -> bool:
    """Llama 4's mixture, with experts that are trained."""
    parts = dict(module.named_children())
    return parts.keys() == {"experts", "router", "shared_expert"} and (
        is_experts_of_all(parts["experts"])
        and any(p.requires_grad for p in parts["experts"].parameters())
    )


def mixture_of_all(module: Any, scored: Scored, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """hidden (rows, T, H) or (rows·T, H)."""
    held = module.experts
    rows = scored.step.as_rows(scored.name, hidden)
    flat = rows.flatten(0, -2)
    scores, logits = module.router(flat)
    number, tokens = held.down_proj.shape[0], len(flat)
    of_token = torch.arange(scored.rows, device=flat.device)
    samples = of_token.repeat_interleave(tokens // scored.rows).repeat(number)

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        x = autocast_input(x)
        with no_autocast(x.device.type):
            return ExpertLinearDot.apply(  # type: ignore[no-any-return]
                x, weight, scored.step, True, [tokens] * number, samples, lambda w: w
            )

    routed = flat.repeat(number, 1) * scores.t().reshape(-1, 1)
    gate, up = linear(routed, held.gate_up_proj).chunk(2, -1)
    out = linear(up * held.act_fn(gate), held.down_proj).unflatten(0, (number, -1)).sum(0)
    return module.shared_expert(flat) + out, logits


def is_relative_bias(module: nn.Module) -> bool:
    """An attention that computes its bias from a trainable table of relative positions."""
    table = getattr(module, "relative_attention_bias", None)
    return (
        isinstance(table, nn.Embedding)
        and bool(own_parameters(table))
        and callable(getattr(module, "compute_bias", None))
    )
