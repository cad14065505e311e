"""Launchers of the compiled fp32 kernels for CPUs with AVX2 or AVX-512 (csrc/dense.cpp).

`available` says whether they serve a tensor; `torch_impl` has the form for all others.
"""

import ctypes

import torch
from torch import Tensor

from ._extension import library

INSTRUCTION_SET: str = library.graddot_instruction_set().decode()


class _Activations(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
    )

    @classmethod
    def of(cls, x: Tensor) -> "_Activations":
        return cls(x.data_ptr(), x.stride(0), x.stride(1))


class _LinearProblem(ctypes.Structure):  # csrc/linear_wgrad.h
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "tokens", "d_in", "d_out")),
        ("act", _Activations),
        ("grad", _Activations),
        ("num_directions", ctypes.c_int64),
        ("direction", ctypes.c_void_p),
        ("val_rows", ctypes.c_void_p),
        ("weight_grad", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("accumulate", ctypes.c_bool),
        ("norms", ctypes.c_bool),
        ("dots", ctypes.c_void_p),
    )


class _CrossEntropy(ctypes.Structure):  # csrc/cross_entropy.h
    _fields_ = (
        ("vocab", ctypes.c_int64),
        ("label_smoothing", ctypes.c_float),
        ("z_loss", ctypes.c_float),
    )


# A large tensor is fresh memory every time, and its page faults take as long as some of the work.
_LARGE = 16 * 1024 * 1024

library.graddot_linear_wgrad_dot.restype = ctypes.c_bool
for _function in ("cross_entropy_grad", "advise_huge_pages"):
    getattr(library, f"graddot_{_function}").restype = None


def available(x: Tensor) -> bool:
    """Whether the kernels run on this processor and take x's dtype and device."""
    return bool(INSTRUCTION_SET) and x.dtype == torch.float32 and x.device.type == "cpu"


def advise_huge_pages(x: Tensor) -> None:
    """Ask the operating system for huge pages below a large tensor that is about to be written."""
    if x.device.type == "cpu" and x.numel() * x.itemsize >= _LARGE:
        library.graddot_advise_huge_pages(
            ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.numel() * x.itemsize)
        )


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _check_linear(
    weight_grad: Tensor, direction: Tensor | None, val_rows: list[int], act: Tensor, grad: Tensor
) -> None:
    """The public functions have checked their arguments; this guards the memory against a direct
    call of an op."""
    if direction is None and (min(val_rows, default=0) < 1 or sum(val_rows) > act.shape[0]):
        raise ValueError(
            f"val_rows has {val_rows}; expected positive row counts, at most {len(act)} in all"
        )
    (n, t, d_in), (*same, d_out) = act.shape, grad.shape
    fit = same == [n, t] and weight_grad.shape == (d_out, d_in)
    fit &= act.dtype == grad.dtype == weight_grad.dtype == torch.float32
    if direction is not None:
        fit &= direction.shape[1:] == (d_out, d_in) and direction.dtype == torch.float32
    if not fit:
        tensors = [x for x in (weight_grad, direction, act, grad) if x is not None]
        got = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in tensors)
        raise ValueError(
            "expected a weight gradient (Dout, Din), directions (K, Dout, Din), act (N, T, Din) and"
            f" grad (N, T, Dout) of one dtype; got {got}"
        )


def linear_wgrad_dot(
    weight_grad: Tensor,
    direction: Tensor | None,
    val_rows: list[int],
    act: Tensor,
    grad: Tensor,
    scale: Tensor | None,
    accumulate: bool,
    norms: bool = False,
) -> Tensor:
    """Dots (K, N) of every sample with `direction`, (K, Dout, Din), or else with the gradients of
    the val rows behind the training rows; the training gradient goes into weight_grad, (Dout, Din),
    contiguous, or is added to it. `norms` as in `functional`."""
    _check_linear(weight_grad, direction, val_rows, act, grad)
    act, grad = _unit_stride(act), _unit_stride(grad)
    (n, t, d_in), d_out = act.shape, grad.shape[2]
    k = len(val_rows)
    if direction is None:
        n -= sum(val_rows)
    else:
        direction, k = direction.contiguous(), direction.shape[0]
    dots = act.new_empty(k + norms, n + (norms and direction is None))
    if weight_grad.numel() == 0:  # directions without an element have no address
        return dots.zero_()
    counts = (ctypes.c_int64 * len(val_rows))(*val_rows)
    problem = _LinearProblem(
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


def cross_entropy_grad(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> Tensor:
    """Losses (R,) of logits (R, vocab), of unit stride along the vocabulary, which become the losses' gradients."""
    losses = logits.new_empty(logits.shape[0])
    labels = labels.contiguous()
    form = _CrossEntropy(logits.shape[1], label_smoothing, z_loss)
    library.graddot_cross_entropy_grad(
        ctypes.byref(form),
        ctypes.c_int64(logits.shape[0]),
        ctypes.c_void_p(labels.data_ptr()),
        ctypes.c_int64(ignore_index),
        ctypes.c_void_p(logits.data_ptr()),
        ctypes.c_int64(logits.stride(0)),
        ctypes.c_void_p(losses.data_ptr()),
    )
    return losses
