"""RMS norms, recognised by what they compute: x · rsqrt(mean(x²) + eps) · weight, or · (1 + weight).

Every model family of transformers has its own class of this layer, so names say nothing. The
forward's values are the module's own, with whatever casts it makes; the backward is ours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graddot_kernels import cpu_kernels, norm_sample_grads

from ..autocast import without_autocast
from ..scored import Scored
from .layers import ScoredFunction, accumulator, has_norm_kernel, rms_norm_backward, vector_grad
from .recompute import remember


@dataclass(frozen=True)
class RMSNormForm:
    """What a norm was found to compute; eps None is the machine epsilon of the compute dtype."""

    eps: float | None
    offset: float  # 1.0 when the factor is (1 + weight)

    def eps_for(self, dtype: torch.dtype) -> float:
        return torch.finfo(dtype).eps if self.eps is None else self.eps


def rms_norm_form(module: nn.Module) -> RMSNormForm | None:
    """The form of a module that is an RMS norm with one 1-d weight; None if it is anything else.

    Compared in float64 on random inputs of ordinary size and of eps's size, with a random weight;
    within 1e-5, because most of these modules compute in fp32 whatever their input is.
    """
    weights = dict(module.named_parameters())
    if len(weights) != 1 or next(module.buffers(), None) is not None:
        return None
    ((name, weight),) = weights.items()
    if "." in name or weight.dim() != 1 or weight.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(
        *shape, generator=generator, dtype=torch.float64, device="cpu"
    )
    x, w = random(3, 2, weight.numel()), random(weight.numel())
    probe = object.__new__(type(module))  # that of a module sharded by itself makes another class's
    probe.__dict__.update(vars(module))
    # What another kind of layer keeps there is not to have what it makes of this.
    probe.__dict__.update({k: v.copy() for k, v in vars(module).items() if type(v) in (list, dict)})
    probe.__dict__["_parameters"] = {name: nn.Parameter(w)}
    attributes = [v for v in vars(module).values() if isinstance(v, float) and 0 <= v < 0.1]
    if isinstance(module, nn.RMSNorm) and module.eps is None:
        attributes = [None]  # type: ignore[list-item]
    attributes = attributes or [1e-6, 1e-5, 1e-8]  # which stand in the forward, as in small models
    for form in (RMSNormForm(eps, offset) for eps in attributes for offset in (0.0, 1.0)):
        size = max(form.eps_for(torch.float64), 1e-12) ** 0.5
        if all(_computes(probe, form, w, x * scale) for scale in (1.0, size)):
            return form
    return None


def _computes(probe: nn.Module, form: RMSNormForm, w: Tensor, x: Tensor) -> bool:
    try:
        with torch.no_grad(), torch.random.fork_rng():
            got = type(probe).forward(probe, x)
    except Exception:  # noqa: BLE001 - whatever a layer of another kind raises, it is no RMS norm
        return False
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + form.eps_for(x.dtype))
    want = x * rstd * (form.offset + w)
    same_shape = isinstance(got, Tensor) and got.shape == want.shape
    return same_shape and bool((got - want).abs().max() <= 1e-5 * want.abs().max())


class RMSNormDot(ScoredFunction):
    """An RMS norm: the module's own forward, and a backward in at least fp32."""

    @staticmethod
    def forward(ctx, x, weight, step, form, original):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.step, ctx.form = step, form
        ctx.uses = step.uses(weight)
        ctx.uses.count_vector()
        return original(x)

    @staticmethod
    @without_autocast
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        step, form = ctx.step, ctx.form
        eps = form.eps_for(accumulator(x.dtype))
        if has_norm_kernel(step, x, grad_out, weight):
            samples, grads = step.as_samples(x), step.as_samples(grad_out)
            scale = weight if ctx.needs_input_grad[0] else None
            x_grad, rows, _ = cpu_kernels.norm_backward(
                samples, grads, scale, None, None, offset=form.offset, eps=eps
            )
            x_grad = None if x_grad is None else x_grad.view(x.shape)
        else:
            x_grad, normed, grad = rms_norm_backward(
                x, weight, grad_out, eps, form.offset, ctx.needs_input_grad[0]
            )
            rows, _ = norm_sample_grads(step.as_samples(normed), step.as_samples(grad))
        weight_grad = vector_grad(step, ctx.uses, rows)
        return x_grad, weight_grad.to(weight.dtype), None, None, None


def rms_norm_rule(form: RMSNormForm, module: nn.Module, scored: Scored, x: Tensor) -> Tensor:
    """The rule of a norm of this form."""
    step, weight = scored.step, next(module.parameters())
    act = step.as_rows(scored.name, x)
    out = RMSNormDot.apply(act, weight, step, form, scored.own_forward)
    if not step.sharded:
        remember(out, lambda x, _: scored.own_forward(x), act, weight)
    return scored.shaped(out)
