"""Launchers of the compiled kernels for CPUs with AVX2, AVX-512 or AMX (csrc/dense.cpp).

`available` says whether they serve a tensor; `torch_impl` has the form for all others.
"""

import ctypes

import torch
from torch import Tensor

from ._extension import library

INSTRUCTION_SET: str = library.graddot_instruction_set().decode()
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/element.h


class _Activations(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("column_stride", ctypes.c_int64),
    )

    @classmethod
    def of(cls, x: Tensor) -> "_Activations":
        row, token, column = x.stride()
        return cls(x.data_ptr(), row, token, column if x.shape[2] > 1 else 1)


class _LinearProblem(ctypes.Structure):  # csrc/linear_wgrad.h
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("element", "rows", "tokens", "d_in", "d_out")),
        ("act", _Activations),
        ("grad", _Activations),
        ("num_directions", ctypes.c_int64),
        ("direction", ctypes.c_void_p),
        ("val_rows", ctypes.c_void_p),
        ("weight_grad", ctypes.c_void_p),
        ("weight_grad_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("accumulate", ctypes.c_bool),
        ("norms", ctypes.c_bool),
        ("dots", ctypes.c_void_p),
    )


class _CrossEntropy(ctypes.Structure):  # csrc/cross_entropy.h
    _fields_ = (
        ("element", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("label_smoothing", ctypes.c_float),
        ("z_loss", ctypes.c_float),
    )


class _ColumnSums(ctypes.Structure):  # csrc/column_sums.h
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("element", "rows", "tokens", "d")),
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("row_stride", "token_stride")),
        ("sums", ctypes.c_void_p),
    )


class _NormProblem(ctypes.Structure):  # csrc/norm.h
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "tokens", "d")),
        *((name, ctypes.c_void_p) for name in ("x", "grad", "weight")),
        ("offset", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("mean", "rstd")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("x_grad", "weight_rows", "bias_rows")),
    )


_TOKENS_OF_A_PART = 128  # csrc/token_parts.h

# A large tensor is fresh memory every time, and its page faults take as long as some of the work.
_LARGE = 16 * 1024 * 1024

for _function in ("linear_wgrad_dot", "cross_entropy_grad"):  # whether there was memory for it
    getattr(library, f"graddot_{_function}").restype = ctypes.c_bool
library.graddot_products.restype = ctypes.c_bool
_PRODUCTS: bool = bool(INSTRUCTION_SET) and library.graddot_products()
# Where `product` is the faster: packing costs what it costs for every row and column of the result.
_LARGE_SIDE, _LARGE_SUM = 384, 128
for _function in ("norm_backward", "column_sums", "advise_huge_pages"):
    getattr(library, f"graddot_{_function}").restype = None


def available(x: Tensor) -> bool:
    """Whether the kernels run on this processor and take x's dtype and device."""
    return bool(INSTRUCTION_SET) and x.dtype in _ELEMENTS and x.device.type == "cpu"


def norms_available(x: Tensor) -> bool:
    """The same of `norm_backward`, which takes fp32 alone."""
    return available(x) and x.dtype == torch.float32


def product_available(x: Tensor, rows: int, columns: int, terms: int) -> bool:
    """Whether products take x's dtype and device, and are faster than PyTorch's for that many rows and
    columns of the result, of so many terms each."""
    large = min(rows, columns) >= _LARGE_SIDE and terms >= _LARGE_SUM
    return large and _PRODUCTS and x.dtype == torch.float32 and available(x)


def advise_huge_pages(x: Tensor) -> None:
    """Ask the operating system for huge pages below a large tensor that is about to be written."""
    if x.device.type == "cpu" and x.numel() * x.itemsize >= _LARGE:
        library.graddot_advise_huge_pages(
            ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.numel() * x.itemsize)
        )


def _as_taken(x: Tensor) -> Tensor:
    """(N, T, width) with unit stride along the width, or where kernels are for products along T."""
    along = _PRODUCTS and x.dtype == torch.float32 and x.stride(1) == 1
    return x if along or x.stride(2) == 1 or x.shape[2] <= 1 else x.contiguous()


def _check_linear(
    weight_grad: Tensor, direction: Tensor | None, val_rows: list[int], act: Tensor, grad: Tensor
) -> None:
    """The public functions have checked their arguments; this guards the memory against a direct
    call of an op."""
    if direction is None and (min(val_rows, default=1) < 1 or sum(val_rows) > act.shape[0]):
        raise ValueError(
            f"val_rows has {val_rows}; expected positive row counts, at most {len(act)} in all"
        )
    (n, t, d_in), (*same, d_out) = act.shape, grad.shape
    fit = same == [n, t] and weight_grad.shape == (d_out, d_in)
    fit &= act.dtype == grad.dtype and act.dtype in _ELEMENTS
    fit &= weight_grad.dtype == torch.float32 and (d_in <= 1 or weight_grad.stride(1) == 1)
    if direction is not None:
        fit &= direction.shape[1:] == (d_out, d_in) and direction.dtype == torch.float32
    if not fit:
        tensors = [x for x in (weight_grad, direction, act, grad) if x is not None]
        got = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in tensors)
        raise ValueError(
            "expected a weight gradient (Dout, Din), of rows of unit stride, and directions (K, Dout, Din)"
            f" in fp32, act (N, T, Din) and grad (N, T, Dout) of one dtype; got {got}"
        )


def linear_wgrad_dot(
    weight_grad: Tensor,
    direction: Tensor | None,
    val_rows: list[int],
    act: Tensor,
    grad: Tensor,
    scale: Tensor | float | None,
    accumulate: bool,
    norms: bool = False,
) -> Tensor:
    """Dots (K, N) of every sample with `direction`, (K, Dout, Din), or else with the gradients of
    the val rows behind the training rows, (0, N) of none; the training gradient goes into weight_grad, (Dout, Din),
    whose rows have unit stride, or is added to it. act and grad may be of 16 bits; all else is fp32. `norms` as in
    `functional`."""
    _check_linear(weight_grad, direction, val_rows, act, grad)
    act, grad = _as_taken(act), _as_taken(grad)
    (n, t, d_in), d_out = act.shape, grad.shape[2]
    k = len(val_rows)
    if direction is None:
        n -= sum(val_rows)
    else:
        direction, k = direction.contiguous(), direction.shape[0]
    dots = weight_grad.new_empty(k + norms, n + (norms and direction is None))
    if weight_grad.numel() == 0:  # directions without an element have no address
        return dots.zero_()
    counts = (ctypes.c_int64 * len(val_rows))(*val_rows)
    problem = _LinearProblem(
        _ELEMENTS[act.dtype],
        n,
        t,
        d_in,
        d_out,
        _Activations.of(act),
        _Activations.of(grad),
        k,
        None if direction is None else direction.data_ptr(),
        ctypes.addressof(counts),
        weight_grad.data_ptr(),
        weight_grad.stride(0),
        1.0 if scale is None else float(scale),
        accumulate,
        norms,
        dots.data_ptr(),
    )
    threads = ctypes.c_int64(torch.get_num_threads())
    if not library.graddot_linear_wgrad_dot(ctypes.byref(problem), threads):
        raise MemoryError(
            f"no memory to pack samples of {act.shape[1]} tokens; the weight gradient is unfinished"
        )
    return dots


def product(x: Tensor, y: Tensor, out: Tensor | None = None, *, accumulate: bool = False) -> Tensor:
    """x @ y, (M, K) and (K, N), where `product_available`; into out, whose rows have unit stride, or added
    to it."""
    if out is None:
        out = x.new_empty(x.shape[0], y.shape[1])
    linear_wgrad_dot(out, None, [], y[None], x.t()[None], None, accumulate)
    return out


def cross_entropy_grad(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> Tensor:
    """Losses (R,) of logits (R, vocab), of unit stride along the vocabulary, which become the losses' gradients."""
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    labels = labels.contiguous()
    form = _CrossEntropy(_ELEMENTS[logits.dtype], logits.shape[1], label_smoothing, z_loss)
    done = library.graddot_cross_entropy_grad(
        ctypes.byref(form),
        ctypes.c_int64(logits.shape[0]),
        ctypes.c_void_p(labels.data_ptr()),
        ctypes.c_int64(ignore_index),
        ctypes.c_void_p(logits.data_ptr()),
        ctypes.c_int64(logits.stride(0)),
        ctypes.c_void_p(losses.data_ptr()),
    )
    if not done:
        raise MemoryError(f"no memory for a row of {logits.shape[1]} logits in fp32")
    return losses


def column_sums(x: Tensor) -> Tensor:
    """Σ_t x of every sample, (N, D) in fp32, of x (N, T, D) that is `available`."""
    n, t, d = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    parts = max(1, -(-t // _TOKENS_OF_A_PART))
    sums = x.new_empty(n, parts, d, dtype=torch.float32)
    problem = _ColumnSums(
        _ELEMENTS[x.dtype], n, t, d, x.data_ptr(), x.stride(0), x.stride(1), sums.data_ptr()
    )
    library.graddot_column_sums(ctypes.byref(problem))
    return sums.squeeze(1) if parts == 1 else sums.sum(1)


def norm_backward(
    x: Tensor,
    grad: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    *,
    offset: float = 0.0,
    eps: float = -1.0,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Of y = x̂ · (offset + weight) + bias, x̂ = (x - mean) · rstd: the gradient of x, (rows, T, d), and
    every row's Σ_t grad·x̂ and Σ_t grad, (rows, d) each, given x and grad, (rows, T, d), weight, (d,),
    and mean and rstd, (rows, T).

    A mean of None is 0 and not x's, as in an RMS norm; a rstd of None is (mean(x²) + eps)^-½, or 1 of a
    negative eps. Without a weight there is no gradient of x.
    """
    n, t, d = x.shape
    tensors = [x, grad] + [y for y in (weight, mean, rstd) if y is not None]
    by_token = [y.shape == (n, t) for y in (mean, rstd) if y is not None]
    fit = grad.shape == x.shape and all(by_token) and (weight is None or weight.shape == (d,))
    if not fit or any(y.dtype != torch.float32 for y in tensors):
        got = ", ".join(f"{y.dtype} {tuple(y.shape)}" for y in tensors)
        raise ValueError(
            "expected x and grad (N, T, D), a weight (D,), mean and rstd (N, T), all fp32; got "
            + got
        )
    x, grad = x.contiguous(), grad.contiguous()
    weight, mean, rstd = (None if y is None else y.contiguous() for y in (weight, mean, rstd))
    x_grad = None if weight is None else torch.empty_like(x)
    parts = max(1, -(-t // _TOKENS_OF_A_PART))
    weight_rows, bias_rows = x.new_empty(n, parts, d), x.new_empty(n, parts, d)
    address = lambda y: None if y is None else y.data_ptr()
    problem = _NormProblem(
        n, t, d, x.data_ptr(), grad.data_ptr(), address(weight), offset, address(mean),
        address(rstd), eps, address(x_grad), weight_rows.data_ptr(), bias_rows.data_ptr(),
    )  # fmt: skip
    library.graddot_norm_backward(ctypes.byref(problem))
    if parts == 1:
        return x_grad, weight_rows.squeeze(1), bias_rows.squeeze(1)
    return x_grad, weight_rows.sum(1), bias_rows.sum(1)
