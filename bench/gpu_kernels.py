"""Every Triton kernel on a GPU beside its floor and its rivals; rows to bench/results/.

    python bench/gpu_kernels.py [--dry-run] [--only wgrad] [--rounds 20]

The floor is the larger of operations over the matrix rate and bytes over the copy bandwidth, both
measured in the same run on bf16. Bytes count every input once and every output once. Times are
medians of CUDA events over interleaved rounds, the L2 cache overwritten before each. A kernel is
compared with float64 first, and a wrong one is not timed.
"""

import argparse
import functools
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import graddot_kernels as gk

Functions = dict[str, Callable[[], object]]

# model: (N, V, T, Din, Dout) of its attention and MLP layers
SHAPES = {
    "small qkv": (32, 4, 1024, 768, 2304),
    "small proj": (32, 4, 1024, 768, 768),
    "small mlp": (32, 4, 1024, 768, 3072),
    "medium mlp": (16, 4, 1024, 1024, 4096),
    "xl mlp": (16, 2, 1024, 1600, 6400),
    "7b attn": (8, 1, 2048, 4096, 4096),
    "7b mlp": (8, 1, 2048, 4096, 11008),
    "short gram": (64, 8, 64, 2048, 2048),
}
ELEMENT = 2  # bytes of bf16


@dataclass(frozen=True)
class Count:
    flops: int
    bytes: int

    def floor(self, rate: float, bandwidth: float) -> float:
        """Seconds."""
        return max(self.flops / rate, self.bytes / bandwidth)


def counts(n: int, v: int, t: int, d_in: int, d_out: int) -> dict[str, Count]:
    tokens, weight = n * t, d_in * d_out
    sides = ELEMENT * (d_in + d_out)
    return {
        "wgrad": Count(2 * tokens * weight, tokens * sides + ELEMENT * weight + 4 * weight),
        "direction": Count(2 * tokens * weight, tokens * sides + ELEMENT * weight),
        "gram": Count(2 * tokens * v * t * (d_in + d_out), (tokens + v * t) * sides),
        "norm": Count(0, 2 * tokens * ELEMENT * d_out),
    }


def naive_wgrad_dot(direction: Tensor, act: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """One weight gradient a sample, written out, then its dot."""
    total, dots = torch.zeros_like(direction, dtype=torch.float32), []
    for a, b in zip(act, grad, strict=True):
        one = b.t() @ a
        dots.append((one * direction).sum(dtype=torch.float32))
        total += one
    return total, torch.stack(dots)


def vmap_dots(direction: Tensor, act: Tensor, grad: Tensor) -> Tensor:
    """torch.func: per-sample gradients of Σ b·(W a) by vmap, then their dots."""

    def loss(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (torch.nn.functional.linear(a, weight) * b).sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(direction, act, grad)
    return grads.flatten(1) @ direction.flatten()


def two_matmuls(val_act: Tensor, val_grad: Tensor, act: Tensor, grad: Tensor) -> Tensor:
    """The gram route with its T × S products in memory."""
    n, t = act.shape[:2]
    products = val_act.flatten(0, 1) @ act.flatten(0, 1).t()
    products *= val_grad.flatten(0, 1) @ grad.flatten(0, 1).t()
    return products.view(-1, n, t).sum((0, 2), dtype=torch.float32)


def functions(op: str, tensors: dict[str, Tensor]) -> Functions:
    """The kernel first, then its variants and rivals."""
    from graddot_kernels.triton_kernels.launch import choose_tile
    from graddot_kernels.triton_kernels.linear_gram import linear_gram_dot
    from graddot_kernels.triton_kernels.linear_wgrad import fused_wgrad_dot

    act, grad, d = tensors["act"], tensors["grad"], tensors["direction"]
    val = tensors["val_act"], tensors["val_grad"]
    acts, grads = act.flatten(0, 1), grad.flatten(0, 1)
    if op == "wgrad":
        tile = replace(choose_tile("wgrad", act), tma=True)
        wide = d.float()

        def tma() -> tuple[Tensor, Tensor]:
            out = act.new_empty(d.shape, dtype=torch.float32)
            return out, fused_wgrad_dot(out, d[None], act, grad, None, False, tile)[0]

        def bias() -> tuple[Tensor, Tensor]:
            out, sums = act.new_empty(d.shape), act.new_empty(len(d))
            return out, gk.linear_wgrad_dot_into(out, d, act, grad, bias_grad=sums)

        return {
            "kernel": lambda: gk.linear_wgrad_dot(d, act, grad),
            "kernel tma": tma,
            "kernel fp32 D": lambda: gk.linear_wgrad_dot(wide, act, grad),
            "kernel bias": bias,
            "cublas": lambda: grads.t() @ acts,
            "cublas bias": lambda: (grads.t() @ acts, grads.sum(0)),
            "naive": lambda: naive_wgrad_dot(d, act, grad),
            "vmap": lambda: vmap_dots(d, act, grad),
        }
    if op == "direction":
        wide = d.float()
        return {
            "kernel": lambda: gk.linear_direction_dot(d, act, grad),
            "kernel fp32 D": lambda: gk.linear_direction_dot(wide, act, grad),
            "cublas": lambda: acts @ d.t(),
            "naive": lambda: ((acts @ d.t()) * grads).sum(1, dtype=torch.float32),
        }
    if op == "gram":
        tile = replace(choose_tile("gram", act), tma=True)
        return {
            "kernel": lambda: gk.linear_ghost_dot(*val, act, grad, method="gram"),
            "kernel tma": lambda: linear_gram_dot(*val, act, grad, False, tile),
            "two matmuls": lambda: two_matmuls(*val, act, grad),
            "direction": lambda: gk.linear_ghost_dot(*val, act, grad, method="direction"),
        }
    return {
        "kernel": lambda: gk.norm_sample_grads(grad, grad),
        "naive": lambda: ((grad * grad).sum(1), grad.sum(1)),
    }


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def check(op: str, tensors: dict[str, Tensor], got: Any) -> None:
    """Against float64 on the first two samples; a weight gradient against a true fp32 product."""
    act, grad, d = (tensors[x] for x in ("act", "grad", "direction"))
    two = torch.bmm(grad[:2].double().transpose(1, 2), act[:2].double())
    if op == "gram":
        val_act, val_grad = (tensors[x].double().flatten(0, 1) for x in ("val_act", "val_grad"))
        d = val_grad.t() @ val_act
    if op == "norm":
        weight, bias = got
        pairs = [(weight[:2], grad[:2].double().square().sum(1)), (bias, grad.double().sum(1))]
    else:
        dots = got[1] if isinstance(got, tuple) else got
        pairs = [(dots[:2], (two * d.double()).sum((1, 2)))]
    if op == "wgrad":
        total = grad.flatten(0, 1).float().t() @ act.flatten(0, 1).float()
        pairs.append((got[0], total))
    for result, want in pairs:
        error = relative_error(result, want.double())
        if not error < 1e-3:
            raise AssertionError(f"{op}: relative error {error:.2e}")


def timed(functions: Functions, rounds: int) -> dict[str, float]:
    """Median seconds of each by CUDA events, interleaved, with L2 overwritten before each."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 3):
        for name, function in functions.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            if i >= 3:
                times[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def ceilings(rounds: int) -> tuple[float, float]:
    """(bf16 matrix rate in FLOP/s, copy bandwidth in bytes/s) of this GPU."""
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    times = timed({"mm": lambda: x @ y, "copy": lambda: target.copy_(source)}, rounds)
    return 2 * 8192**3 / times["mm"], 2 * source.nbytes / times["copy"]


def make(n: int, v: int, t: int, d_in: int, d_out: int) -> dict[str, Tensor]:
    shapes = {
        "act": (n, t, d_in), "grad": (n, t, d_out), "direction": (d_out, d_in),
        "val_act": (v, t, d_in), "val_grad": (v, t, d_out),
    }  # fmt: skip
    return {
        name: torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        for name, shape in shapes.items()
    }


def peak_bytes(function: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - before


def measure(op: str, name: str, rate: float, bandwidth: float, rounds: int) -> dict[str, object]:
    tensors = make(*SHAPES[name])
    count = counts(*SHAPES[name])[op]
    candidates = functions(op, tensors)
    for variant in [x for x in candidates if x.startswith("kernel")]:
        check(op, tensors, candidates[variant]())
    per_sample = 2 * SHAPES[name][0] * tensors["direction"].nbytes
    if "vmap" in candidates and per_sample > torch.cuda.mem_get_info()[0] // 2:
        del candidates["vmap"]
    times = timed(candidates, rounds)
    seconds = times["kernel"]
    return {
        "op": op, "shape": name, "n_v_t_din_dout": SHAPES[name], "dtype": "bf16",
        "us": {k: round(x * 1e6, 1) for k, x in times.items()},
        "floor_us": round(count.floor(rate, bandwidth) * 1e6, 1),
        "of_floor": round(count.floor(rate, bandwidth) / seconds, 3),
        "of_cublas": round(times["cublas"] / seconds, 3) if "cublas" in times else None,
        "tflops": round(count.flops / seconds / 1e12, 1),
        "gb_per_s": round(count.bytes / seconds / 1e9, 1),
        "extra_bytes": {k: peak_bytes(f) for k, f in candidates.items()},
        "ceiling_tflops": round(rate / 1e12, 1), "copy_gb_per_s": round(bandwidth / 1e9, 1),
    }  # fmt: skip


def measure_auto(rounds: int) -> dict[str, object]:
    """How far method="auto" is from the better route over a grid of lengths and widths."""
    worst, rows = 0.0, []
    for t in (16, 64, 256, 1024, 4096):
        for d in (128, 512, 2048, 8192):
            tensors = make(4, 4, t, d, d)
            args = [tensors[x] for x in ("val_act", "val_grad", "act", "grad")]
            times = timed(
                {
                    method: lambda m=method, a=args: gk.linear_ghost_dot(*a, method=m)  # type: ignore[misc]
                    for method in ("auto", "gram", "direction")
                },
                rounds,
            )
            excess = times["auto"] / min(times["gram"], times["direction"]) - 1
            worst = max(worst, excess)
            rows.append([t, d, *(round(times[m] * 1e6, 1) for m in ("auto", "gram", "direction"))])
    return {"op": "auto", "worst_excess": round(worst, 3), "t_d_auto_gram_direction_us": rows}


def measure_cross_entropy(
    rate: float, bandwidth: float, rounds: int, rows: int = 4096, device: str = "cuda"
) -> dict[str, object]:
    """A chunk of the fused head's logits, of GPT-2's odd vocabulary, in rows of a multiple of 16."""
    kernel, vocab = torch.ops.graddot.cross_entropy_grad, 50257
    whole = torch.randn((rows, 50272), device=device, dtype=torch.bfloat16)
    labels = torch.randint(0, vocab, (rows,), device=device)
    few = whole[:16, :vocab].double().requires_grad_()
    want = torch.nn.functional.cross_entropy(few, labels[:16], reduction="none")
    (want_grad,) = torch.autograd.grad(want.sum(), few)
    got = whole[:16].clone()
    losses = kernel(got[:, :vocab], labels[:16], -100, 0.0, 0.0)
    errors = relative_error(losses, want.detach()), relative_error(got[:, :vocab], want_grad)
    if not (errors[0] < 1e-5 and errors[1] < 4e-3):  # the gradient is rounded to bf16
        raise AssertionError(f"cross entropy: relative errors {errors[0]:.2e}, {errors[1]:.2e}")
    plain = whole[:, :vocab].contiguous().requires_grad_()

    def stock() -> None:
        loss = torch.nn.functional.cross_entropy(plain, labels, reduction="sum")
        torch.autograd.grad(loss, plain)

    def ours() -> None:
        kernel(whole[:, :vocab], labels, -100, 0.0, 0.0)

    count = Count(0, 2 * ELEMENT * rows * vocab)
    times = timed({"kernel": ours, "torch": stock}, rounds)
    return {
        "op": "cross_entropy", "shape": f"{rows} rows of {vocab}", "dtype": "bf16",
        "us": {k: round(x * 1e6, 1) for k, x in times.items()},
        "floor_us": round(count.floor(rate, bandwidth) * 1e6, 1),
        "of_floor": round(count.floor(rate, bandwidth) / times["kernel"], 3),
        "gb_per_s": round(count.bytes / times["kernel"] / 1e9, 1),
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
    }  # fmt: skip


def run(jobs: dict[str, Callable[[], dict[str, object]]]) -> int:
    """A row of each in bench/results/; one that fails is shown, and the others follow."""
    from _report import append_row

    failed = 0
    for name, job in jobs.items():
        try:
            row = job()
        except Exception:  # noqa: BLE001 - compilers and devices may raise anything
            failed += 1
            print(f"{name}: no row", traceback.format_exc(), sep="\n", flush=True)
            continue
        append_row("gpu_kernels", row)
        shown = ("op", "shape", "us", "floor_us", "of_floor", "of_cublas")
        print({k: row[k] for k in shown if k in row} if "us" in row else row, flush=True)
    print(f"rows {len(jobs) - failed}, failed {failed}")
    return 1 if failed else 0


def dry_run(names: list[str]) -> None:
    for shape, sizes in SHAPES.items():
        print(f"{shape}: N={sizes[0]} V={sizes[1]} T={sizes[2]} Din={sizes[3]} Dout={sizes[4]}")
        for op, count in counts(*sizes).items():
            if op in names:
                print(f"  {op:10} {count.flops / 1e9:10.1f} GFLOP {count.bytes / 1e6:10.1f} MB")


def main() -> int:
    ops = ["wgrad", "direction", "gram", "norm", "cross_entropy", "auto"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print shapes and counts; no GPU")
    parser.add_argument("--only", nargs="+", choices=ops, default=ops)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if args.dry_run:
        dry_run(args.only)
        return 0
    if not torch.cuda.is_available():
        print("gpu_kernels: not measured, torch.cuda is not available; --dry-run prints counts")
        return 1
    rate, bandwidth = ceilings(args.rounds)
    print(f"ceiling {rate / 1e12:.0f} TFLOP/s bf16, copy {bandwidth / 1e9:.0f} GB/s")
    jobs: dict[str, Callable[[], dict[str, object]]] = {
        f"{op}, {shape}": functools.partial(measure, op, shape, rate, bandwidth, args.rounds)
        for op in args.only if op not in ("auto", "cross_entropy") for shape in args.shapes
    }  # fmt: skip
    if "cross_entropy" in args.only:
        jobs["cross_entropy"] = functools.partial(
            measure_cross_entropy, rate, bandwidth, args.rounds
        )
    if "auto" in args.only:
        jobs["auto"] = functools.partial(measure_auto, max(5, args.rounds // 4))
    return run(jobs)


if __name__ == "__main__":
    sys.exit(main())
