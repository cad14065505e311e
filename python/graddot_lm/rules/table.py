"""Which rule scores a layer: the table of layers, `register_layer`, and what is refused.

A rule computes a layer's output in a step through `Scored`, whose operations score parameters. The
table is by exact type, and by base type for subclasses that keep its forward. RMS norms are known
by what they compute. Any other layer with parameters of its own gets a general rule (general.py),
which is proven against autograd on the layer's first input, or refused there with the reason.
"""

import functools
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..compiling.in_graph import layer_norm, linear, rms_norm
from ..distributed import layer_type
from ..errors import GraddotError
from ..scored import Scored, any_layout, by_token, has_own_forward, in_graph, own_parameters
from .attention import multihead_attention
from .convolutions import conv_rule
from .general import ProvenRule, Rule, general_rule
from .norms import RMSNormForm, rms_norm_form, rms_norm_rule
from .recurrent import PROJECTIONS, cell_rule, recurrent_rule
from .transformers_layers import (
    experts,
    few_experts,
    is_adapted_experts,
    is_experts,
    is_experts_of_all,
    is_mixture_of_all,
    is_relative_bias,
    mixture_of_all,
)


@by_token
@in_graph(linear)
def _linear(module: nn.Module, scored: Scored, input: Tensor) -> Tensor:
    assert isinstance(module, (nn.Linear, Conv1D))
    return scored.linear(input, module.weight, module.bias, transposed=isinstance(module, Conv1D))


@by_token
def _embedding(module: nn.Module, scored: Scored, input: Tensor) -> Tensor:
    assert isinstance(module, nn.Embedding)
    return scored.embedding(input, module.weight, module.padding_idx)


@by_token
@in_graph(layer_norm)
def _layer_norm(module: nn.Module, scored: Scored, input: Tensor) -> Tensor:
    assert isinstance(module, nn.LayerNorm)
    shape = list(module.normalized_shape)
    return scored.layer_norm(input, shape, module.weight, module.bias, module.eps)


_TABLE: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    Conv1D: _linear,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.Conv1d: conv_rule,
    nn.Conv2d: conv_rule,
    nn.MultiheadAttention: multihead_attention,
    nn.RNN: recurrent_rule,
    nn.LSTM: recurrent_rule,
    nn.GRU: recurrent_rule,
    nn.RNNCell: cell_rule,
    nn.LSTMCell: cell_rule,
    nn.GRUCell: cell_rule,
}
_registered: dict[type[nn.Module], Rule | None] = {}


def register_layer(layer: type[nn.Module], rule: Rule | None = None) -> Any:
    """Teach the engine a layer; a decorator of the rule, or a call.

        @register_layer(Scale)
        def scale(module, scored, x):                       # x (rows, T, d)
            return x * scored.per_sample(module.weight)[:, None]

    The rule gets the module, a `Scored` and the arguments of the layer's forward, and returns what
    that returns; it is for this exact type. `check_layer` proves it against autograd. A mere
    `register_layer(Scale)` lets the general rule hold a gradient of every sample for layers of
    this type, whatever their size.
    """
    if rule is not None:
        _registered[layer] = rule
        return rule

    def decorate(function: Rule) -> Rule:
        _registered[layer] = function
        return function

    _registered.setdefault(layer, None)
    return decorate


def refusal(module: nn.Module) -> str | None:
    """Why the parameters directly owned by this module cannot be scored; None if they can."""
    if layer_type(module) in _registered:
        return None
    if not has_own_forward(module):
        return "its forward was replaced on the instance; a rule is for a class's forward"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        if module.max_norm is not None:
            return "max_norm changes the weights in the forward"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq mixes samples"
        reason = "sparse gradients are not supported; make it with sparse=False"
        return reason if module.sparse else None
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and mixes_samples(module):
        return "BatchNorm in training mode mixes samples; use GroupNorm, or eval() it"
    if isinstance(module, nn.RNNBase) and module.proj_size > 0:
        return PROJECTIONS
    computed = [n for n, x in vars(module).items() if isinstance(x, Tensor)]
    computed = [n for n in computed if {f"{n}_g", f"{n}_orig"} & own_parameters(module).keys()]
    if computed:
        return (
            f"a hook computes {computed[0]} before the forward, where that is not followed, as those of"
            " torch.nn.utils.weight_norm, spectral_norm and prune do; use"
            " torch.nn.utils.parametrizations or parametrize"
        )
    return None


def mixes_samples(module: nn.Module) -> bool:
    """A BatchNorm that normalises over the batch."""
    batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return batch_norm and (module.training or module.running_mean is None)


@any_layout
def _batch_norm(module: nn.Module, scored: Scored, input: Tensor) -> Tensor:
    """A frozen BatchNorm: nothing to score, but it must not mix samples."""
    if mixes_samples(module):
        raise GraddotError(
            f"layer {scored.name}: BatchNorm in training mode mixes samples; eval() it"
        )
    return scored.own_forward(input)


@by_token
def _norm_or_general(
    form: RMSNormForm, general: Rule, module: nn.Module, scored: Scored, *args: Any, **kwargs: Any
) -> Any:
    """A layer known as an RMS norm of its first argument may take more, such as a gate."""
    if len(args) == 1 and all(x is None for x in kwargs.values()):
        return rms_norm_rule(form, module, scored, *args)
    return general(module, scored, *args, **kwargs)


def rule_for(module: nn.Module) -> Rule | None:
    """The rule for a module; None for one without trainable parameters of its own to score."""
    registered = _registered.get(layer_type(module))
    if registered is not None:
        return registered
    if is_relative_bias(module):
        return general_rule()
    trained = any(p.requires_grad for p in module.parameters())
    if trained and is_adapted_experts(module):
        return ProvenRule({"experts": lambda most: experts})
    if is_mixture_of_all(module):
        return ProvenRule({"experts": lambda most: mixture_of_all})
    if is_experts_of_all(module):  # whose rule is that of the mixture around
        return None
    if trained and nn.utils.parametrize.is_parametrized(module):  # a weight is computed of others
        return general_rule(any_size=getattr(module, "groups", 1) > 1)
    lists = (nn.ParameterList, nn.ParameterDict)  # which have no forward of their own
    listed: list[nn.Module] = [part for part in module.children() if isinstance(part, lists)]
    if isinstance(module, nn.MultiheadAttention):  # which does not call it
        listed.append(module.out_proj)
    if not own_parameters(module) and not any(map(own_parameters, listed)):
        return _batch_norm if isinstance(module, nn.modules.batchnorm._BatchNorm) else None
    for base, rule in _TABLE.items():
        if isinstance(module, base) and type(module).forward is base.forward:
            if rule is not conv_rule:
                return rule
            own = type(module)._conv_forward is not base._conv_forward  # type: ignore[attr-defined]
            general = own or module.groups > 1  # type: ignore[operator]
            return general_rule(any_size=True) if general else rule
    if is_experts(module):
        return ProvenRule({"experts": lambda most: experts}, smaller=few_experts)
    form = rms_norm_form(module)
    if form is None:
        return general_rule(any_size=layer_type(module) in _registered)
    norm = functools.partial(_norm_or_general, form, general_rule())
    return in_graph(functools.partial(rms_norm, form))(norm)
