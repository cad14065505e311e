"""The public functions: check the arguments, bring them to canonical shape, call the op.

Everywhere: `act` (N, T, Din) and `grad` (N, T, Dout) are a linear layer's input and the loss
gradient at its output, `ids` (N, T) and `grad` (N, T, d) an embedding's; two-dimensional
activations mean T = 1. Floating inputs are fp32, bf16, fp16 or fp64, any strides, one device, one
dtype; results are fp32 (fp64 for fp64). Formulas: Wang et al., "Data Shapley in One Training Run",
ICLR 2025, section 4.2 and appendix D, with the notation of the README.

With `norms` the dots have one more row, every sample's squared norm ‖G_i‖², (K + 1, N), and where
the directions are rows of the batch one more column, their squared norms ‖D_k‖², (K + 1, N + 1),
with 0 in the corner.

Results have no derivative: torch warns in a backward that comes to one. Those of inputs that require
grad keep their graph alive as any other tensor does; under `torch.no_grad()` they do not.
"""

import contextlib
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from . import ops  # noqa: F401 (registers torch.ops.graddot)
from .torch_impl import products_fp32

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What the gram route's Hadamard product and sum take for a pair of tokens, in multiply-adds of a
# matrix product: measured on a CPU at widths from 128 to 2048, with T where the two routes draw
# even. On a GPU one kernel does it all, at a guess somewhat below the library's rate.
_GRAM_MACS_PER_PAIR = 25
_GRAM_COST_PER_MAC_ON_GPU = 1.3


def _check(ok: bool, name: str, got: object, expected: str) -> None:
    if not ok:
        shape = f"shape {tuple(got.shape)}" if isinstance(got, Tensor) else f"{got!r}"
        raise ValueError(f"{name} has {shape}; expected {expected}")


def _check_floats(**tensors: Tensor) -> None:
    """All of the first's dtype and device, but for a direction of fp32 beside 16 bits."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in _FLOATS:
            raise ValueError(f"{name} has dtype {x.dtype}; expected one of {_FLOATS}")
        _check_dense(name, x)
        wide = name == "direction" and x.dtype == torch.float32 and first.itemsize == 2
        if x.dtype != first.dtype and not wide:
            raise ValueError(f"{name} has dtype {x.dtype}; expected {first_name}'s, {first.dtype}")
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device}; expected {first_name}'s, {first.device}")


def _check_dense(name: str, x: Tensor) -> None:
    if x.layout != torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else f"of layout {x.layout}"
        raise ValueError(f"{name} is {kind}; expected a dense tensor")


def _in_full_precision(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """For products outside of an op; an op leaves autocast by itself. A meta tensor has none."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _rows(name: str, x: Tensor) -> Tensor:
    """(N, T, D), where (N, D) means T = 1."""
    _check(x.dim() in (2, 3), name, x, "(N, T, D), or (N, D) for T = 1")
    return x.unsqueeze(1) if x.dim() == 2 else x


def _pair(act_name: str, act: Tensor, grad_name: str, grad: Tensor) -> tuple[Tensor, Tensor]:
    """act and grad of the same samples and tokens, in canonical shape."""
    acts = _rows(act_name, act)
    if grad.dim() != act.dim() or grad.shape[:-1] != act.shape[:-1]:
        # Made where it is needed: a traced size has no str, or becomes a number of its graph.
        expected = ", ".join(map(str, act.shape[:-1]))
        _check(False, grad_name, grad, f"({expected}, Dout), as {act_name}")
    return acts, _rows(grad_name, grad)


def _check_scale(scale: Tensor | None, like: Tensor) -> None:
    if scale is None:
        return
    _check(isinstance(scale, Tensor) and scale.dim() == 0, "scale", scale, "a 0-dim tensor")
    if scale.is_complex():
        raise ValueError(f"scale has dtype {scale.dtype}; expected a real one")
    if scale.device.type not in ("cpu", like.device.type):
        raise ValueError(f"scale is on {scale.device}; expected the CPU, or {like.device}")


def _id_rows(prefix: str, ids: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """ids (N, T) and grad (N, T, d) in canonical shape; ids (N,) with grad (N, d) mean T = 1."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{prefix}ids must be a tensor, got {type(ids).__name__}")
    _check_dense(f"{prefix}ids", ids)
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{prefix}ids has dtype {ids.dtype}; expected int32 or int64")
    _check(ids.dim() in (1, 2), f"{prefix}ids", ids, "(N, T), or (N,) for T = 1")
    if grad.dim() != ids.dim() + 1 or grad.shape[:-1] != ids.shape:
        expected = ", ".join(map(str, ids.shape))  # see `_pair`
        _check(False, f"{prefix}grad", grad, f"({expected}, d), as {prefix}ids")
    if ids.device != grad.device:
        raise ValueError(f"{prefix}ids is on {ids.device}; expected grad's, {grad.device}")
    return (ids.unsqueeze(1), grad.unsqueeze(1)) if ids.dim() == 1 else (ids, grad)


def _directions(direction: Tensor, d_rows: int | None, d_cols: int) -> tuple[Tensor, bool]:
    """(K, rows, cols), and whether the caller gave a single direction without K."""
    expected = f"([K,] {'num_embeddings' if d_rows is None else d_rows}, {d_cols})"
    single = direction.dim() == 2
    stacked = direction.unsqueeze(0) if single else direction
    ok = stacked.dim() == 3 and stacked.shape[2] == d_cols
    ok = ok and (d_rows is None or stacked.shape[1] == d_rows)  # a traced size is `in` no tuple
    _check(ok, "direction", direction, expected)
    _check(stacked.shape[0] > 0, "direction", direction, "at least one direction")
    return stacked, single


def _check_whole(name: str, number: object) -> None:
    if not isinstance(number, (Integral, torch.SymInt)):
        got = f"a {type(number).__name__}" if isinstance(number, Tensor) else repr(number)
        raise TypeError(f"{name} must be a whole number, got {got}")


def _padding(padding_idx: int | None, num_embeddings: int) -> int:
    """torch.nn.Embedding's convention (negative counts from the end) as the op's: -1 is none."""
    _check_whole("num_embeddings", num_embeddings)
    if num_embeddings < 0:
        raise ValueError(f"num_embeddings is {num_embeddings}; expected the rows of a table")
    if padding_idx is None:
        return -1
    _check_whole("padding_idx", padding_idx)
    _check(
        -num_embeddings <= padding_idx < num_embeddings,
        "padding_idx",
        padding_idx,
        f"an index into {num_embeddings} embeddings",
    )
    return padding_idx % num_embeddings


def linear_ghost_dot(
    val_act: Tensor,
    val_grad: Tensor,
    train_act: Tensor,
    train_grad: Tensor,
    *,
    pairwise: bool = False,
    method: Literal["auto", "gram", "direction"] = "auto",
) -> Tensor:
    """Dot products of the val rows' weight gradient with that of every training sample.

    val_act (V, S, Din), val_grad (V, S, Dout), train_act (N, T, Din), train_grad (N, T, Dout).
    Returns ⟨Σ_v G_v, G_i⟩, (N,), or with `pairwise` ⟨G_v, G_i⟩, (V, N), where
    G_i = Σ_t b_it a_itᵀ. "gram" multiplies token by token, N·T·V·S·(Din+Dout) multiply-adds and
    no weight-sized tensor; "direction" forms Σ_v G_v (each G_v if pairwise) in fp32 and costs
    (N·T + V·S)·Din·Dout (V times N·T if pairwise; twice N·T for 16-bit rows on a GPU, whose dots
    are then off by at most 2⁻¹⁶ of ‖Σ_v G_v‖‖G_i‖: see `linear_direction_dot`); "auto" takes the
    one that by these counts, weighed with measured rates, is faster.

    Raises ValueError naming the argument whose shape, dtype or device does not fit.
    """
    _check_floats(val_act=val_act, val_grad=val_grad, train_act=train_act, train_grad=train_grad)
    val_act, val_grad = _pair("val_act", val_act, "val_grad", val_grad)
    train_act, train_grad = _pair("train_act", train_act, "train_grad", train_grad)
    d_in, d_out = val_act.shape[2], val_grad.shape[2]
    _check(train_act.shape[2] == d_in, "train_act", train_act, f"(N, T, {d_in}), val_act's width")
    _check(
        train_grad.shape[2] == d_out, "train_grad", train_grad, f"(N, T, {d_out}), val_grad's width"
    )
    _check(method in ("auto", "gram", "direction"), "method", method, "auto, gram or direction")
    if method == "auto":
        v, s = val_act.shape[:2]
        n, t = train_act.shape[:2]
        pairs, width = n * t * v * s, d_in + d_out
        on_cpu = train_act.device.type == "cpu"
        gram = pairs * (
            width + _GRAM_MACS_PER_PAIR if on_cpu else width * _GRAM_COST_PER_MAC_ON_GPU
        )
        split = not on_cpu and train_act.itemsize == 2
        products = (v if pairwise else 1) * (2 if split else 1)
        by_direction = (n * t * products + v * s) * d_in * d_out
        method = "gram" if gram <= by_direction else "direction"
    if method == "gram":
        return torch.ops.graddot.linear_gram_dot(val_act, val_grad, train_act, train_grad, pairwise)
    if not pairwise:  # one long row, so that one product sums over the val rows
        val_act, val_grad = val_act.flatten(0, 1)[None], val_grad.flatten(0, 1)[None]
    with _in_full_precision(val_act):
        direction = _val_directions(val_act, val_grad)
    dots = torch.ops.graddot.linear_direction_dot(direction, train_act, train_grad, False)
    return dots if pairwise else dots[0]


def _val_directions(act: Tensor, grad: Tensor) -> Tensor:
    """Every row's gradient, (V, Dout, Din), in fp32: a 16-bit one would be rounded, and may
    overflow."""
    if act.is_cuda and act.itemsize == 2 and len(act) > 0:  # products on the matrix units
        return products_fp32(zip(act, grad, strict=True))
    if act.dtype != torch.float64:
        act, grad = act.float(), grad.float()
    return torch.bmm(grad.transpose(1, 2), act)


def linear_direction_dot(
    direction: Tensor, act: Tensor, grad: Tensor, *, per_token: bool = False
) -> Tensor:
    """Dot products of given directions with every sample's weight gradient: Σ_t b_itᵀ D a_it.

    direction (Dout, Din) or (K, Dout, Din), act (N, T, Din), grad (N, T, Dout), one dtype, or fp32
    directions with 16-bit samples. Returns (N,), or the terms of every token, (N, T), with
    `per_token`; a leading K when the direction has one. A GPU multiplies 16-bit samples with an
    fp32 direction as the sum of two of their dtype: two products, and an error of at most 2⁻¹⁶ of
    ‖D‖ Σ_t ‖b_t‖‖a_t‖, in fp16 no more than fp32's own.

    Raises ValueError naming the argument whose shape, dtype or device does not fit.
    """
    _check_floats(act=act, grad=grad, direction=direction)
    act, grad = _pair("act", act, "grad", grad)
    direction, single = _directions(direction, grad.shape[2], act.shape[2])
    dots = torch.ops.graddot.linear_direction_dot(direction, act, grad, per_token)
    return dots[0] if single else dots


def linear_wgrad_dot(
    direction: Tensor,
    act: Tensor,
    grad: Tensor,
    *,
    scale: Tensor | None = None,
    norms: bool = False,
) -> tuple[Tensor, Tensor]:
    """The weight gradient of a batch together with every sample's dot with given directions.

    direction (Dout, Din) or (K, Dout, Din), act (N, T, Din), grad (N, T, Dout), one dtype, or fp32
    directions with 16-bit samples, for which a GPU's products still are those of 16 bits (where
    samples are short, as in `linear_direction_dot`); scale a 0-dim tensor. Returns
    scale · Σ_i G_i, (Dout, Din), and ⟨D, G_i⟩, (N,) or (K, N), not scaled; with `norms` also
    ‖G_i‖², as the last of K + 1 rows, (2, N) for a single direction.

    Raises ValueError naming the argument whose shape, dtype or device does not fit.
    """
    _check_floats(act=act, grad=grad, direction=direction)
    act, grad = _pair("act", act, "grad", grad)
    direction, single = _directions(direction, grad.shape[2], act.shape[2])
    _check_scale(scale, act)
    weight_grad, dots = torch.ops.graddot.linear_wgrad_dot(direction, act, grad, scale, norms)
    return weight_grad, dots[0] if single and not norms else dots


def linear_wgrad_dot_into(
    weight_grad: Tensor,
    direction: Tensor,
    act: Tensor,
    grad: Tensor,
    *,
    bias_grad: Tensor | None = None,
    bias_direction: Tensor | None = None,
    scale: Tensor | None = None,
    accumulate: bool = False,
    norms: bool = False,
) -> Tensor:
    """`linear_wgrad_dot` into buffers of the caller's, such as a parameter's `.grad`: the dots.

    weight_grad (Dout, Din) becomes scale · Σ_i G_i, in its own dtype and strides, or with
    `accumulate` that much more. With bias_grad, (Dout,), the bias's gradient goes there likewise;
    with bias_direction, (Dout,) or (K, Dout), the dots are those of weight and bias together. So are
    `norms`, if either is given.

    Raises ValueError naming the argument whose shape, dtype or device does not fit.
    """
    _check_floats(act=act, grad=grad, direction=direction)
    act, grad = _pair("act", act, "grad", grad)
    (n, _, d_in), d_out = act.shape, grad.shape[2]
    direction, single = _directions(direction, d_out, d_in)
    _check_scale(scale, act)
    _check_buffer("weight_grad", weight_grad, (d_out, d_in), act)
    bias_rows = None
    if bias_direction is not None:
        _check_floats(direction=direction, bias_direction=bias_direction)
        shape = (d_out,) if single else (len(direction), d_out)
        _check(bias_direction.shape == shape, "bias_direction", bias_direction, f"{shape}")
    if bias_grad is not None:
        _check_buffer("bias_grad", bias_grad, (d_out,), act)
    if bias_grad is not None or bias_direction is not None:
        dtype = torch.float64 if act.dtype == torch.float64 else torch.float32
        bias_rows = act.new_empty((n, d_out), dtype=dtype)
    dots = torch.ops.graddot.linear_wgrad_dot_into(
        weight_grad, bias_rows, direction, act, grad, scale, accumulate, norms
    )
    if bias_rows is not None:
        # A direction or scale that requires grad would make dots and buffer parts of a graph.
        with torch.no_grad(), _in_full_precision(act):
            if bias_direction is not None:
                dots[: len(direction)] += bias_direction.to(bias_rows.dtype) @ bias_rows.t()
            if norms:
                dots[-1] += bias_rows.square().sum(1)
            if bias_grad is not None:
                total = bias_rows.sum(0) if scale is None else bias_rows.sum(0) * scale
                bias_grad.copy_(bias_grad + total if accumulate else total)
    return dots[0] if single and not norms else dots


def _check_buffer(name: str, buffer: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if not isinstance(buffer, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(buffer).__name__}")
    if buffer.dtype not in _FLOATS:
        raise ValueError(f"{name} has dtype {buffer.dtype}; expected one of {_FLOATS}")
    _check_dense(name, buffer)
    if buffer.device != like.device:
        raise ValueError(f"{name} is on {buffer.device}; expected act's, {like.device}")
    _check(buffer.shape == shape, name, buffer, f"{shape}")
    if any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), shape, strict=True)):
        raise ValueError(
            f"{name} has strides {buffer.stride()}, several elements in one place; expected a place"
            " for each, as clone() makes it"
        )


def linear_joint_wgrad_dot(
    act: Tensor,
    grad: Tensor,
    val_rows: list[int],
    *,
    scale: Tensor | None = None,
    norms: bool = False,
) -> tuple[Tensor, Tensor]:
    """`linear_wgrad_dot` where the directions are the gradients of rows in the same batch.

    act (N + ΣV_k, T, Din) and grad (N + ΣV_k, T, Dout) hold N training rows first, then
    val_rows[k] = V_k rows of target k, in order. Returns scale · Σ_{i<N} G_i, (Dout, Din), and
    ⟨Σ_{v of k} G_v, G_i⟩, (K, N), or with `norms` (K + 1, N + 1). On a CPU no direction is held
    whole.

    Raises ValueError naming the argument whose shape, dtype or device does not fit.
    """
    _check_floats(act=act, grad=grad)
    act, grad = _pair("act", act, "grad", grad)
    _check_val_rows(val_rows, act.shape[0])
    _check_scale(scale, act)
    return torch.ops.graddot.linear_joint_wgrad_dot(act, grad, val_rows, scale, norms)


def _check_val_rows(val_rows: list[int], rows: int) -> None:
    if not isinstance(val_rows, (list, tuple)):
        raise TypeError(f"val_rows must be a list of numbers, got {type(val_rows).__name__}")
    for k, count in enumerate(val_rows):
        _check_whole(f"val_rows[{k}]", count)
    if len(val_rows) == 0 or min(val_rows) <= 0 or sum(val_rows) > rows:
        expected = f"positive row counts, one a target, at most {rows} in all"  # see `_pair`
        _check(False, "val_rows", val_rows, expected)


def embedding_ghost_dot(
    val_ids: Tensor,
    val_grad: Tensor,
    train_ids: Tensor,
    train_grad: Tensor,
    num_embeddings: int,
    *,
    padding_idx: int | None = None,
) -> Tensor:
    """Dot products of the val rows' embedding gradient with that of every training sample, (N,).

    val_ids (V, S), val_grad (V, S, d), train_ids (N, T), train_grad (N, T, d); ids int32 or int64
    in [0, num_embeddings). Tokens equal to padding_idx have no gradient. Only ids of the val batch
    are held: O((N·T + V·S)·d) work.

    Raises ValueError naming the argument that does not fit; IndexError for an id outside the table.
    """
    _check_floats(val_grad=val_grad, train_grad=train_grad)
    val_ids, val_grad = _id_rows("val_", val_ids, val_grad)
    train_ids, train_grad = _id_rows("train_", train_ids, train_grad)
    d = val_grad.shape[2]
    _check(train_grad.shape[2] == d, "train_grad", train_grad, f"(N, T, {d}), val_grad's width")
    padding = _padding(padding_idx, num_embeddings)
    return torch.ops.graddot.embedding_ghost_dot(
        val_ids, val_grad, train_ids, train_grad, num_embeddings, padding
    )


def embedding_direction_dot(
    direction: Tensor,
    ids: Tensor,
    grad: Tensor,
    *,
    padding_idx: int | None = None,
    per_token: bool = False,
) -> Tensor:
    """Dot products of given directions with every sample's embedding gradient: Σ_t D[id_it]·b_it.

    direction (num_embeddings, d) or (K, num_embeddings, d), ids (N, T), grad (N, T, d). Returns
    (N,), or (N, T) with `per_token`; a leading K when the direction has one.

    Raises ValueError naming the argument that does not fit; IndexError for an id outside the table.
    """
    _check_floats(direction=direction, grad=grad)
    ids, grad = _id_rows("", ids, grad)
    direction, single = _directions(direction, None, grad.shape[2])
    padding = _padding(padding_idx, direction.shape[1])
    dots = torch.ops.graddot.embedding_direction_dot(direction, ids, grad, padding, per_token)
    return dots[0] if single else dots


def embedding_wgrad_dot(
    direction: Tensor,
    ids: Tensor,
    grad: Tensor,
    num_embeddings: int,
    *,
    padding_idx: int | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The embedding's weight gradient together with every sample's dot with given directions.

    direction ([K,] num_embeddings, d), ids (N, T), grad (N, T, d), scale a 0-dim tensor. Returns
    scale · Σ_i G_i, (num_embeddings, d), and ⟨D, G_i⟩, (N,) or (K, N), not scaled.

    Raises ValueError naming the argument that does not fit; IndexError for an id outside the table.
    """
    _check_floats(direction=direction, grad=grad)
    ids, grad = _id_rows("", ids, grad)
    direction, single = _directions(direction, num_embeddings, grad.shape[2])
    padding = _padding(padding_idx, num_embeddings)
    _check_scale(scale, grad)
    weight_grad, dots = torch.ops.graddot.embedding_wgrad_dot(direction, ids, grad, padding, scale)
    return weight_grad, dots[0] if single else dots


def embedding_joint_wgrad_dot(
    ids: Tensor,
    grad: Tensor,
    val_rows: list[int],
    num_embeddings: int,
    *,
    padding_idx: int | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`embedding_wgrad_dot` where the directions are the gradients of rows in the same batch.

    ids (N + ΣV_k, T), grad (N + ΣV_k, T, d): training rows first, then val_rows[k] rows of target
    k. Returns scale · Σ_{i<N} G_i, (num_embeddings, d), and the dots, (K, N).

    Raises ValueError naming the argument that does not fit; IndexError for an id outside the table.
    """
    _check_floats(grad=grad)
    ids, grad = _id_rows("", ids, grad)
    _check_val_rows(val_rows, ids.shape[0])
    padding = _padding(padding_idx, num_embeddings)
    _check_scale(scale, grad)
    return torch.ops.graddot.embedding_joint_wgrad_dot(
        ids, grad, val_rows, num_embeddings, padding, scale
    )


def norm_sample_grads(
    normed: Tensor, grad: Tensor, *, mean: Tensor | None = None, rstd: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Per-sample gradients of a norm layer's weight, Σ_t b⊙x̂, and bias, Σ_t b; (N, d) each.

    normed (N, T, d) is the normalised input x̂ before weight and bias, grad (N, T, d) the loss
    gradient at the layer's output. With mean or rstd, (N, T) fp32 (fp64 for fp64 input), normed is
    the layer's input x instead, and x̂ = (x - mean) · rstd is made on the way. The results are small
    enough to keep: dots with any direction, norms and cosines are one matrix product away.

    Raises ValueError naming the argument whose shape, dtype or device does not fit.
    """
    _check_floats(normed=normed, grad=grad)
    high = torch.float64 if normed.dtype == torch.float64 else torch.float32
    for name, x in (("mean", mean), ("rstd", rstd)):
        if x is not None:
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
            _check(
                x.shape == normed.shape[:-1], name, x, f"{tuple(normed.shape[:-1])}, a token one"
            )
            if x.dtype != high or x.device != normed.device:
                raise ValueError(
                    f"{name} has dtype {x.dtype} on {x.device}; expected {high} on {normed.device}"
                )
    return _norm_sample_grads("", normed, grad, mean, rstd)


def _norm_sample_grads(
    prefix: str, normed: Tensor, grad: Tensor, *statistics: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, grads = _pair(f"{prefix}normed", normed, f"{prefix}grad", grad)
    expected = f"{tuple(normed.shape)}, {prefix}normed's shape"
    _check(grad.shape == normed.shape, f"{prefix}grad", grad, expected)
    by_row = (None if x is None else x.reshape(rows.shape[:2]) for x in statistics)
    return torch.ops.graddot.norm_sample_grads(rows, grads, *by_row)


def norm_ghost_dot(
    val_normed: Tensor,
    val_grad: Tensor,
    train_normed: Tensor,
    train_grad: Tensor,
    *,
    bias: bool = True,
) -> Tensor:
    """Dots of the val rows' gradient of a norm's parameters with every sample's, (N,).

    val_normed and val_grad (V, S, d), train_normed and train_grad (N, T, d). The weight's dot,
    plus the bias's unless `bias` is false (RMSNorm).

    Raises ValueError naming the argument whose shape, dtype or device does not fit.
    """
    _check_floats(
        val_normed=val_normed, val_grad=val_grad, train_normed=train_normed, train_grad=train_grad
    )
    val_weight, val_bias = _norm_sample_grads("val_", val_normed, val_grad)
    weight, bias_grads = _norm_sample_grads("train_", train_normed, train_grad)
    d = val_weight.shape[1]
    _check(weight.shape[1] == d, "train_normed", train_normed, f"(N, T, {d}), val_normed's width")
    with _in_full_precision(weight):
        dots = weight @ val_weight.sum(0)
        return dots + bias_grads @ val_bias.sum(0) if bias else dots


def norm_wgrad_dot(
    direction: Tensor, normed: Tensor, grad: Tensor, *, bias_direction: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A norm's weight and bias gradients together with every sample's dot with given directions.

    direction and bias_direction (d,) or (K, d), normed and grad (N, T, d). Returns the weight
    gradient, (d,), the bias gradient, (d,), and the dots, (N,) or (K, N), to which the bias
    contributes only if it has a direction.

    Raises ValueError naming the argument whose shape, dtype or device does not fit.
    """
    _check_floats(direction=direction, normed=normed, grad=grad)
    weight, bias = _norm_sample_grads("", normed, grad)
    expected = f"([K,] {weight.shape[1]}), K at least 1"
    ok = direction.dim() in (1, 2) and direction.shape[-1] == weight.shape[1]
    none = direction.dim() == 2 and direction.shape[0] == 0
    _check(ok and not none, "direction", direction, expected)
    with _in_full_precision(weight):
        dots = direction.to(weight.dtype) @ weight.t()
        if bias_direction is not None:
            _check_floats(direction=direction, bias_direction=bias_direction)
            ok = bias_direction.shape == direction.shape
            expected = f"{tuple(direction.shape)}, direction's shape"
            _check(ok, "bias_direction", bias_direction, expected)
            dots = dots + bias_direction.to(bias.dtype) @ bias.t()
    return weight.sum(0), bias.sum(0), dots
