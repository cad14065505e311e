"""Every op of `torch.ops.graddot`: its schema, its fake, and its implementation on each device.

This is the one place of registration. A public function in `functional` checks and shapes its
arguments and calls the op; the op calls the launcher chosen here. Inside, shapes are canonical:
act (N, T, Din), grad (N, T, Dout), direction (K, Dout, Din), ids (N, T); dots are (K, N).
`padding_idx` is -1 for none. 16-bit inputs are accumulated in fp32 and give fp32 results.
On a GPU the linear and norm ops are Triton kernels, except for fp64.
"""

import functools

import torch
from torch import Tensor

from . import _extension, fused_head, torch_impl
from .triton_kernels import gpu_implementation

_lib = torch.library.Library("graddot", "DEF")

# Op -> device -> the module that implements it there.
routes: dict[str, dict[str, str]] = {}


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _without_modes(function):  # type: ignore[no-untyped-def]
    """Inside an autocast region the products of an op would be rounded to 16 bits, and autograd
    would record what an op does: it then refuses `out=`, and buffers become part of a graph."""

    @functools.wraps(function)
    def wrapped(first: Tensor, *args):  # type: ignore[no-untyped-def]
        # Entering a context takes longer than small ops.
        if torch.is_grad_enabled():
            with torch.no_grad():
                return wrapped(first, *args)
        kind = first.device.type
        if not torch.is_autocast_enabled(kind):
            return function(first, *args)
        with torch.autocast(kind, enabled=False):
            return function(first, *args)

    return wrapped


def _noting_writes(name: str, function):  # type: ignore[no-untyped-def]
    """Autograd is told of what the op writes, else a backward that needs what was there before
    would take what is there now."""
    arguments = getattr(torch.ops.graddot, name).default._schema.arguments
    written = [i for i, x in enumerate(arguments) if x.alias_info and x.alias_info.is_write]
    if not written:
        return function

    @functools.wraps(function)
    def wrapped(*args):  # type: ignore[no-untyped-def]
        result = function(*args)
        for x in (args[i] for i in written):
            if x is not None and not x.is_inference():  # which no backward needs
                torch.autograd.graph.increment_version(x)
        return result

    return wrapped


def _define(schema: str, fake, cpu, cuda) -> None:  # type: ignore[no-untyped-def]
    """An implementation of None is the extension's: csrc/ registers it as the library is loaded."""
    name = schema.split("(")[0]
    _lib.define(schema)
    routes[name] = {}
    for device, function in (("CPU", cpu), ("CUDA", cuda)):
        if function is not None:
            _lib.impl(name, _noting_writes(name, _without_modes(function)), device)
        routes[name][device] = function.__module__ if function else "graddot_kernels._C"
    torch.library.register_fake(f"graddot::{name}", fake, lib=_lib)


def _fake_linear_gram_dot(
    val_act: Tensor, val_grad: Tensor, train_act: Tensor, train_grad: Tensor, pairwise: bool
) -> Tensor:
    v, n = val_act.shape[0], train_act.shape[0]
    return train_act.new_empty((v, n) if pairwise else (n,), dtype=_result_dtype(train_act))


def _fake_linear_direction_dot(
    direction: Tensor, act: Tensor, grad: Tensor, per_token: bool
) -> Tensor:
    shape = (direction.shape[0], *(act.shape[:2] if per_token else act.shape[:1]))
    return act.new_empty(shape, dtype=_result_dtype(act))


def _or_one_more(count: int, more: bool) -> int:
    """count + more; a traced bool is not a number."""
    return count + 1 if more else count


def _fake_linear_wgrad_dot(
    direction: Tensor, act: Tensor, grad: Tensor, scale: Tensor | None, norms: bool = False
) -> tuple[Tensor, Tensor]:
    dtype = _result_dtype(act)
    weight_grad = act.new_empty((grad.shape[2], act.shape[2]), dtype=dtype)
    rows = _or_one_more(direction.shape[0], norms)
    return weight_grad, act.new_empty((rows, act.shape[0]), dtype=dtype)


def _fake_linear_wgrad_dot_into(
    weight_grad: Tensor,
    bias_grads: Tensor | None,
    direction: Tensor,
    act: Tensor,
    grad: Tensor,
    scale: Tensor | None,
    accumulate: bool,
    norms: bool = False,
) -> Tensor:
    rows = _or_one_more(direction.shape[0], norms)
    return act.new_empty((rows, act.shape[0]), dtype=_result_dtype(act))


def _fake_linear_joint_wgrad_dot(
    act: Tensor, grad: Tensor, val_rows: list[int], scale: Tensor | None, norms: bool = False
) -> tuple[Tensor, Tensor]:
    dtype = _result_dtype(act)
    weight_grad = act.new_empty((grad.shape[2], act.shape[2]), dtype=dtype)
    train_rows = act.shape[0] - sum(val_rows)
    shape = _or_one_more(len(val_rows), norms), _or_one_more(train_rows, norms)
    return weight_grad, act.new_empty(shape, dtype=dtype)


def _fake_embedding_ghost_dot(
    val_ids: Tensor,
    val_grad: Tensor,
    train_ids: Tensor,
    train_grad: Tensor,
    num_embeddings: int,
    padding_idx: int,
) -> Tensor:
    return train_grad.new_empty(train_grad.shape[:1], dtype=_result_dtype(train_grad))


def _fake_embedding_direction_dot(
    direction: Tensor, ids: Tensor, grad: Tensor, padding_idx: int, per_token: bool
) -> Tensor:
    shape = (direction.shape[0], *(ids.shape if per_token else ids.shape[:1]))
    return grad.new_empty(shape, dtype=_result_dtype(grad))


def _fake_embedding_wgrad_dot(
    direction: Tensor, ids: Tensor, grad: Tensor, padding_idx: int, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = _result_dtype(grad)
    weight_grad = grad.new_empty(direction.shape[1:], dtype=dtype)
    return weight_grad, grad.new_empty((direction.shape[0], ids.shape[0]), dtype=dtype)


def _fake_embedding_joint_wgrad_dot(
    ids: Tensor,
    grad: Tensor,
    val_rows: list[int],
    num_embeddings: int,
    padding_idx: int,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype = _result_dtype(grad)
    weight_grad = grad.new_empty((num_embeddings, grad.shape[2]), dtype=dtype)
    return weight_grad, grad.new_empty((len(val_rows), ids.shape[0] - sum(val_rows)), dtype=dtype)


def _fake_cross_entropy_grad(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> Tensor:
    return logits.new_empty(labels.shape, dtype=_result_dtype(logits))


def _fake_linear_cross_entropy(
    act: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    val_rows: list[int],
    direction: Tensor | None,
    val_ids: Tensor,
    train_ids: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    weight_scale: Tensor | None,
    weight_needed: bool,
    own_ids: Tensor | None = None,
    norms: bool = False,
) -> tuple[Tensor, ...]:
    (rows, t, width), vocab, k = act.shape, weight.shape[0], len(val_rows)
    n, dtype = rows - sum(val_rows), _result_dtype(act)
    dots = 0 if not weight_needed else k if direction is None else direction.shape[0]
    norms = norms and dots > 0
    result = functools.partial(act.new_empty, dtype=dtype)
    return (
        result((rows, t)),
        act.new_empty(act.shape),
        result((vocab if weight_needed else 0, width)),
        result((rows if bias is not None else 0, vocab)),
        result((_or_one_more(dots, norms), _or_one_more(n, norms and direction is None))),
        act.new_empty((n, t, val_ids.numel())),
        result((dots, train_ids.numel() if weight_needed else 0, width)),
        result((n, 0 if own_ids is None else own_ids.shape[1], width)),
    )


def _fake_norm_sample_grads(
    x: Tensor, grad: Tensor, mean: Tensor | None = None, rstd: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    shape, dtype = (grad.shape[0], grad.shape[2]), _result_dtype(grad)
    return grad.new_empty(shape, dtype=dtype), grad.new_empty(shape, dtype=dtype)


_define(
    "linear_gram_dot(Tensor val_act, Tensor val_grad, Tensor train_act, Tensor train_grad,"
    " bool pairwise) -> Tensor",
    fake=_fake_linear_gram_dot,
    cpu=torch_impl.linear_gram_dot,
    cuda=gpu_implementation("linear_gram", "linear_gram_dot", torch_impl.linear_gram_dot),
)
_define(
    "linear_direction_dot(Tensor direction, Tensor act, Tensor grad, bool per_token) -> Tensor",
    fake=_fake_linear_direction_dot,
    cpu=torch_impl.linear_direction_dot,
    cuda=gpu_implementation(
        "linear_direction", "linear_direction_dot", torch_impl.linear_direction_dot
    ),
)
_define(
    "linear_wgrad_dot(Tensor direction, Tensor act, Tensor grad, Tensor? scale, bool norms=False)"
    " -> (Tensor, Tensor)",
    fake=_fake_linear_wgrad_dot,
    cpu=torch_impl.linear_wgrad_dot,
    cuda=gpu_implementation("linear_wgrad", "linear_wgrad_dot", torch_impl.linear_wgrad_dot),
)
_define(
    "linear_wgrad_dot_into(Tensor(a!) weight_grad, Tensor(b!)? bias_grads, Tensor direction,"
    " Tensor act, Tensor grad, Tensor? scale, bool accumulate, bool norms=False) -> Tensor",
    fake=_fake_linear_wgrad_dot_into,
    cpu=torch_impl.linear_wgrad_dot_into,
    cuda=gpu_implementation(
        "linear_wgrad", "linear_wgrad_dot_into", torch_impl.linear_wgrad_dot_into
    ),
)
_define(
    "linear_joint_wgrad_dot(Tensor act, Tensor grad, int[] val_rows, Tensor? scale,"
    " bool norms=False) -> (Tensor, Tensor)",
    fake=_fake_linear_joint_wgrad_dot,
    cpu=torch_impl.linear_joint_wgrad_dot,
    cuda=gpu_implementation(
        "linear_wgrad", "linear_joint_wgrad_dot", torch_impl.linear_joint_wgrad_dot
    ),
)
_define(
    "embedding_ghost_dot(Tensor val_ids, Tensor val_grad, Tensor train_ids, Tensor train_grad,"
    " int num_embeddings, int padding_idx) -> Tensor",
    fake=_fake_embedding_ghost_dot,
    cpu=None,
    cuda=None if _extension.HAS_CUDA else torch_impl.embedding_ghost_dot,
)
_define(
    "embedding_direction_dot(Tensor direction, Tensor ids, Tensor grad, int padding_idx,"
    " bool per_token) -> Tensor",
    fake=_fake_embedding_direction_dot,
    cpu=None,
    cuda=None if _extension.HAS_CUDA else torch_impl.embedding_direction_dot,
)
_define(
    "embedding_wgrad_dot(Tensor direction, Tensor ids, Tensor grad, int padding_idx,"
    " Tensor? scale) -> (Tensor, Tensor)",
    fake=_fake_embedding_wgrad_dot,
    cpu=None,
    cuda=None if _extension.HAS_CUDA else torch_impl.embedding_wgrad_dot,
)
_define(
    "embedding_joint_wgrad_dot(Tensor ids, Tensor grad, int[] val_rows, int num_embeddings,"
    " int padding_idx, Tensor? scale) -> (Tensor, Tensor)",
    fake=_fake_embedding_joint_wgrad_dot,
    cpu=None,
    cuda=None if _extension.HAS_CUDA else torch_impl.embedding_joint_wgrad_dot,
)
_define(
    "cross_entropy_grad(Tensor(a!) logits, Tensor labels, int ignore_index,"
    " float label_smoothing, float z_loss) -> Tensor",
    fake=_fake_cross_entropy_grad,
    cpu=torch_impl.cross_entropy_grad,
    cuda=gpu_implementation("cross_entropy", "cross_entropy_grad", torch_impl.cross_entropy_grad),
)
_define(
    "linear_cross_entropy(Tensor act, Tensor weight, Tensor? bias, Tensor labels, int[] val_rows,"
    " Tensor? direction, Tensor val_ids, Tensor train_ids, int ignore_index, float label_smoothing, float z_loss,"
    " Tensor? weight_scale, bool weight_needed, Tensor? own_ids=None, bool norms=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_linear_cross_entropy,
    cpu=fused_head.linear_cross_entropy,
    cuda=fused_head.linear_cross_entropy,
)
_define(
    "norm_sample_grads(Tensor x, Tensor grad, Tensor? mean=None, Tensor? rstd=None)"
    " -> (Tensor, Tensor)",
    fake=_fake_norm_sample_grads,
    cpu=torch_impl.norm_sample_grads,
    cuda=gpu_implementation("norm", "norm_sample_grads", torch_impl.norm_sample_grads),
)
