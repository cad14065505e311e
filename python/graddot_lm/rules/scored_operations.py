"""Calls with what is followed for which there is a scored operation, which needs no copies."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import GraddotError
from .followed import Followed

TABLES = {func: inspect.signature(func) for func in (F.embedding, F.embedding_bag)}
MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class Refused(GraddotError):
    """Of what a layer does, and no other way of scoring it changes: each row's part of a gradient that
    is scaled by how often an id is in the batch can be proven, but is no part of that."""


def scored_operation(followed: Followed, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The call's result by a scored operation; None if there is none for it."""
    if func in MATMULS and len(args) == 2:
        return _linear(followed, args[0], args[1], matmul=True)
    if func is F.linear:
        return _linear(followed, *args, **kwargs)
    if func in TABLES:
        _check_table(followed, TABLES[func].bind(*args, **kwargs).arguments)
    if func is F.embedding:
        return _embedding(followed, *args, **kwargs)
    return _norm(followed, *args, **kwargs) if func is F.layer_norm else None


def _linear(
    followed: Followed,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    matmul: bool = False,
) -> Tensor | None:
    own, transposed = followed.form(weight)
    rows = followed.scored.rows
    if own is None or own.dim() != 2:
        return None
    if bias is not None:
        form = followed.form(bias)[0]
        bias = bias if form is None else form
        if followed.is_computed(bias):
            return None
    product = lambda x: followed.scored.linear_of_rows(
        x, own, bias, transposed=transposed != matmul
    )
    if followed.is_one_for_all(input):
        if followed.scored.step.tokens is not None:  # as many positions as tokens are no tokens
            return None
        out = input @ weight if matmul else F.linear(input, weight, bias)
        followed.follow(out, lambda: product(followed.copies(input)).to(out.dtype))
        return out
    input = followed.as_rows(input)
    entries = followed.entries_of_rows(input)
    if input.dim() < 2 or entries is None or len({*entries}) > 1:
        return None
    if input.shape[0] == rows:
        return product(input)
    return product(input.unflatten(0, (rows, -1))).flatten(0, 1)


def _check_table(followed: Followed, arguments: dict[str, Any]) -> None:
    if arguments["weight"] not in followed:
        return
    if any(arguments.get(name) for name in ("max_norm", "scale_grad_by_freq", "sparse")):
        raise Refused("max_norm, scale_grad_by_freq and sparse are not supported")


def _embedding(  # type: ignore[no-untyped-def]
    followed, input, weight, padding_idx=None, max_norm=None, norm_type=2.0,
    scale_grad_by_freq=False, sparse=False,
):  # fmt: skip
    own, transposed = followed.form(weight)
    known = input in followed or followed.is_constant(input)
    if own is None or transposed:
        if known or padding_idx is None or weight not in followed:
            return None
        return followed.mapped(_padded, (input, weight, padding_idx % len(weight)), {}, [input])
    if padding_idx is not None:  # may count from the end
        padding_idx %= len(own)
    if not followed.is_constant(input):
        return followed.scored.embedding(input, own, padding_idx).to(weight.dtype)
    out = F.embedding(input, weight, padding_idx)
    followed.follow(out, lambda: followed.scored.table(input, own, padding_idx).to(weight.dtype))
    return out


def _norm(  # type: ignore[no-untyped-def]
    followed, input, normalized_shape, weight=None, bias=None, eps=1e-5
):
    known = input in followed or followed.is_constant(input)
    if not followed.is_own(weight) or known or followed.is_computed(bias):
        return None
    return followed.scored.layer_norm(input, list(normalized_shape), weight, bias, eps)


def _padded(ids: Tensor, weight: Tensor, padding_idx: int) -> Tensor:
    """F.embedding's, of which torch.vmap forgets that the table's row has no gradient."""
    out = F.embedding(ids, weight)
    return torch.where((ids == padding_idx).unsqueeze(-1), out.detach(), out)
