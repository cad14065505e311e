"""Random inputs of the linear and norm functions: shapes, dtypes and memory layouts; and by
what their routes are chosen."""

from typing import NamedTuple

import pytest
import torch
from kernel_checks import FP32_ERROR
from torch import Tensor

from graddot_kernels import torch_impl

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES["fp64"] = torch.float64
LAYOUTS = ("plain", "transposed", "sliced", "expanded")


class Problem(NamedTuple):
    act: Tensor
    grad: Tensor
    val_act: Tensor
    val_grad: Tensor
    direction: Tensor

    @property
    def tolerance(self) -> float:
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        return FP32_ERROR * (ratio if self.act.dtype == torch.float64 else 1)


def activations(layout: str, n: int, t: int, d: int, dtype: torch.dtype) -> Tensor:
    if layout == "two-dim":
        return torch.randn(n, d).to(dtype)
    if layout == "transposed":
        return torch.randn(d, t, n).to(dtype).permute(2, 1, 0)
    if layout == "sliced":
        return torch.randn(2 * n, t, d + 3).to(dtype)[::2, :, :d]
    if layout == "expanded":
        return torch.randn(1, t, d).to(dtype).expand(n, t, d)
    return torch.randn(n, t, d).to(dtype)


def make(
    n: int = 5, t: int = 7, d_in: int = 13, d_out: int = 17, v: int = 3, s: int | None = None,
    k: int = 2, layout: str = "plain", grad_layout: str | None = None, dtype: str = "fp32",
) -> Problem:  # fmt: skip
    torch.manual_seed(0)
    kind, s = DTYPES[dtype], t if s is None else s
    layouts = layout, grad_layout or layout
    act, grad = (activations(x, n, t, d, kind) for x, d in zip(layouts, (d_in, d_out), strict=True))
    val_act, val_grad = (
        activations(x, v, s, d, kind) for x, d in zip(layouts, (d_in, d_out), strict=True)
    )
    direction = activations("sliced" if layout == "sliced" else "plain", k, d_out, d_in, kind)
    return Problem(act, grad, val_act, val_grad, direction)


def rows(x: Tensor) -> Tensor:
    return x.unsqueeze(1) if x.dim() == 2 else x


def joint(p: Problem) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", enabled=False):  # its cat refuses fp16
        return torch.cat([p.act, p.val_act]), torch.cat([p.grad, p.val_grad])


@pytest.fixture(params=[0, 10**6], ids=["by-products", "by-calls"])
def each_count(request, monkeypatch) -> None:
    """Routes chosen by multiply-adds alone, as of large layers, and by calls, as of small ones."""
    monkeypatch.setattr(torch_impl, "_MACS_OF_CALLS", request.param)
