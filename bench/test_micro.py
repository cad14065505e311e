"""`make bench-micro`: every family of ops on a CPU beside its rivals, each checked before it is timed.

    python bench/test_micro.py [-k t16]      # rows to bench/results/micro.jsonl, and the ratios
    pytest bench/test_micro.py               # pytest-benchmark's table alone

One group a family and shape, fp32, GPT-2 Small's widths, N = 8, V = 1. Plain forms: for
`linear_wgrad_dot` the weight gradient's product alone, without dots, in bf16 cast to fp32 as autocast
does; for `linear_ghost_dot` all
token-by-token products at once; for the cross-entropy PyTorch's own, forward and backward; for norms
a row sum in PyTorch; for a norm's backward autograd's, without samples' own gradients. "torch" is our form for processors that the compiled kernels do not serve.
Embeddings are in bench_embedding.py. pytest-benchmark times one form after another, not
interleaved: on a machine whose speed varies, look at several rows.

Last line: of each form the largest ratio to the plain one over the shapes, and auto_over_best, the
largest ratio of `linear_ghost_dot(method="auto")` to the faster of both routes over a grid.
"""

import functools
import itertools
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from _report import append_row, interleave
from graddot_lm.rules.layers import rms_norm_backward
from torch import Tensor

import graddot_kernels as gk
from graddot_kernels import cpu_kernels

N, V, VOCABULARY = 8, 1, 50257
TOKENS = (16, 256, 1024)
EPS = 1e-5
WIDTHS = ((768, 768), (768, 3072))  # Din, Dout
PLAIN = {"wgrad": "gemm", "wgrad_bf16": "gemm", "ghost": "two_matmuls", "cross_entropy": "pytorch", "norm": "pytorch",
         "layer_norm": "pytorch", "rms_norm": "pytorch"}  # fmt: skip
# T and width, square: all but those of which one route takes over 80 GFLOP.
GRID = tuple(
    (t, d)
    for t, d in itertools.product((16, 64, 256, 1024, 4096), (128, 512, 2048, 8192))
    if max(2 * N * t * V * t * 2 * d, 2 * (N + V) * t * d * d) < 80e9
)
# In every test below the forms of one problem come one after the other.
PROBLEMS = [
    pytest.param(t, *widths, id="t{}-{}x{}".format(t, *widths)) for t in TOKENS for widths in WIDTHS
]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1]))


@functools.lru_cache(1)
def linear_problem(
    t: int, d_in: int, d_out: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """act, grad, val_act, val_grad; the training and val gradients and the dots in float64."""
    act, val_act = random(N + V, t, d_in).to(dtype).split((N, V))
    grad, val_grad = random(N + V, t, d_out).to(dtype).split((N, V))
    of = lambda a, b: b.double().flatten(0, 1).t() @ a.double().flatten(0, 1)
    direction = of(val_act, val_grad)
    samples = [of(act[i : i + 1], grad[i : i + 1]) for i in range(N)]
    dots = torch.stack([(sample * direction).sum() for sample in samples])
    return act, grad, val_act, val_grad, torch.stack(samples).sum(0), direction, dots


def right(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    """Figures of a wrong result are worth nothing."""
    error = ((got.double() - want).norm() / want.norm()).item()
    assert error <= tolerance, f"wrong result, no figure: relative error {error:.1e}"


def without_compiled_kernels(function: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with mock.patch.object(cpu_kernels, "available", lambda x: False):
            return function()

    return run


def case(family: str, shape: object, form: str, benchmark) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"{family} {shape}"
    benchmark.extra_info.update(family=family, shape=str(shape), form=form)


@pytest.mark.parametrize("form", ["compiled", "torch", "gemm"])
@pytest.mark.parametrize("t, d_in, d_out", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_linear_wgrad_dot(benchmark, form, t, d_in, d_out, dtype):  # type: ignore[no-untyped-def]
    act, grad, _, _, weight_grad, direction, dots = linear_problem(t, d_in, d_out, dtype)
    direction = direction.float()
    ours = lambda: gk.linear_wgrad_dot(direction, act, grad)
    forms = {
        "compiled": ours,
        "torch": without_compiled_kernels(ours),
        "gemm": lambda: ((grad.flatten(0, 1).t() @ act.flatten(0, 1)).float(), None),
    }
    short = dtype == torch.bfloat16
    case("wgrad_bf16" if short else "wgrad", f"t{t}-{d_in}x{d_out}", form, benchmark)
    got, got_dots = forms[form]()
    right(got, weight_grad, 1e-2 if short and form == "gemm" else 1e-4)
    if got_dots is not None:
        right(got_dots, dots)
    benchmark(forms[form])


def two_matmuls(val_act: Tensor, val_grad: Tensor, act: Tensor, grad: Tensor) -> Tensor:
    """The published ghost form: every product of two tokens, then Hadamard, then sums."""
    acts = act.flatten(0, 1) @ val_act.flatten(0, 1).t()
    grads = grad.flatten(0, 1) @ val_grad.flatten(0, 1).t()
    return (acts * grads).view(len(act), -1).sum(1)


@pytest.mark.parametrize("form", ["auto", "gram", "direction", "two_matmuls"])
@pytest.mark.parametrize("t, d_in, d_out", PROBLEMS)
def test_linear_ghost_dot(benchmark, form, t, d_in, d_out):  # type: ignore[no-untyped-def]
    act, grad, val_act, val_grad, _, _, dots = linear_problem(t, d_in, d_out)
    run = lambda: gk.linear_ghost_dot(val_act, val_grad, act, grad, method=form)
    if form == "two_matmuls":
        run = lambda: two_matmuls(val_act, val_grad, act, grad)
    case("ghost", f"t{t}-{d_in}x{d_out}", form, benchmark)
    right(run(), dots)
    benchmark(run)


@functools.lru_cache(1)
def cross_entropy_problem(rows: int) -> tuple[Tensor, ...]:
    """Logits (rows, vocabulary) and labels; losses and their sum's gradient in float64."""
    logits = 3 * random(rows, VOCABULARY)
    labels = torch.arange(rows) * 97 % VOCABULARY
    exact = logits.double().requires_grad_()
    losses = torch.logsumexp(exact, 1) - exact.gather(1, labels[:, None])[:, 0]
    losses.sum().backward()
    assert exact.grad is not None
    return logits, labels, losses.detach(), exact.grad


def pytorch_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    x = logits.requires_grad_()
    losses = F.cross_entropy(x, labels, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), x)[0]


@pytest.mark.parametrize("form", ["compiled", "torch", "pytorch"])
@pytest.mark.parametrize("rows", [64, 512], ids="rows{}".format)
def test_cross_entropy_grad(benchmark, form, rows):  # type: ignore[no-untyped-def]
    """The logits become their gradients in place, so every round gets them anew, outside its time."""
    logits, labels, want_losses, want_grad = cross_entropy_problem(rows)

    def ours(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.graddot.cross_entropy_grad(x, y, -100, 0.0, 0.0), x

    forms = {
        "compiled": ours,
        "torch": lambda x, y: without_compiled_kernels(lambda: ours(x, y))(),
        "pytorch": pytorch_cross_entropy,
    }
    case("cross_entropy", f"rows{rows}", form, benchmark)
    losses, grad = forms[form](logits.clone(), labels)
    right(losses, want_losses)
    right(grad, want_grad)
    setup = lambda: ((logits.clone(), labels), {})
    benchmark.pedantic(forms[form], setup=setup, rounds=max(5, 2048 // rows), warmup_rounds=1)


@pytest.mark.parametrize("form", ["ghost", "wgrad", "pytorch"])
@pytest.mark.parametrize("t", TOKENS, ids="t{}".format)
def test_norm(benchmark, form, t):  # type: ignore[no-untyped-def]
    normed, val_normed = random(N + V, t, 768).split((N, V))
    grad, val_grad = random(N + V, t, 768).flip(2).split((N, V))
    of = lambda x, b: torch.stack([(b.double() * x.double()).sum(1), b.double().sum(1)])
    direction = of(val_normed, val_grad).sum(1)
    dots = torch.einsum("kd,knd->n", direction, of(normed, grad))
    weight, bias = direction.float()

    def plain() -> Tensor:
        """The dots by hand, for directions at hand."""
        return (grad * normed).sum(1) @ weight + grad.sum(1) @ bias

    forms = {
        "ghost": lambda: gk.norm_ghost_dot(val_normed, val_grad, normed, grad),
        "wgrad": lambda: gk.norm_wgrad_dot(weight, normed, grad, bias_direction=bias)[2],
        "pytorch": plain,
    }
    case("norm", f"t{t}", form, benchmark)
    right(forms[form](), dots)
    benchmark(forms[form])


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, torch.zeros_like(weight), EPS)


@pytest.mark.parametrize("form", ["compiled", "torch", "pytorch"])
@pytest.mark.parametrize("t", TOKENS, ids="t{}".format)
@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_norm_backward(benchmark, norm, form, t):  # type: ignore[no-untyped-def]
    """The gradients of x and of every row's weight, beside autograd's of x and the weight."""
    x, grad, weight = random(N + V, t, 768), random(N + V, t, 768).flip(2), random(768)
    exact = [y.double().requires_grad_() for y in (x, weight.expand(N + V, 1, -1))]
    want = torch.autograd.grad(norm_of_rows(norm, *exact), exact, grad.double())
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    out = norm(*leaves)
    mean, rstd = torch.native_layer_norm(x, [768], weight, None, EPS)[1:]

    def torch_forms() -> tuple[Tensor, Tensor]:
        if norm is rms_norm:
            x_grad, *factors = rms_norm_backward(x, weight, grad, EPS, 0.0)
            return x_grad, torch.ops.graddot.norm_sample_grads(*factors)[0]
        x_grad = torch.ops.aten.native_layer_norm_backward(
            grad, x, [768], mean, rstd, weight, None, [True, False, False]
        )[0]
        rows = torch.ops.graddot.norm_sample_grads(x, grad, mean[..., 0], rstd[..., 0])
        return x_grad, rows[0]

    def compiled() -> tuple[Tensor, Tensor]:
        if norm is rms_norm:
            return cpu_kernels.norm_backward(x, grad, weight, None, None, eps=EPS)[:2]
        return cpu_kernels.norm_backward(x, grad, weight, mean[..., 0], rstd[..., 0])[:2]

    forms = {
        "compiled": compiled,
        "torch": without_compiled_kernels(torch_forms),
        "pytorch": lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True),
    }
    case(norm.__name__, f"t{t}", form, benchmark)
    x_grad, weight_grad = forms[form]()
    right(x_grad, want[0])
    rows = want[1][:, 0]
    right(weight_grad, rows.sum(0) if form == "pytorch" else rows)
    benchmark(forms[form])


def norm_of_rows(norm: Callable[..., Tensor], x: Tensor, weights: Tensor) -> Tensor:
    """With a weight for every row."""
    return norm(x, torch.ones_like(weights[0, 0])) * weights


# What to make of it


def ratios(benchmarks: list[dict]) -> dict[str, float]:
    """Rows to bench/results; the largest ratio of every form to its family's plain one."""
    medians: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for each in benchmarks:
        info = each["extra_info"]
        medians[info["family"], info["shape"]][info["form"]] = each["stats"]["median"]
    worst: dict[str, float] = {}
    for (family, shape), seconds in medians.items():
        plain = PLAIN[family]
        if plain not in seconds:  # left out by -k
            continue
        own = {f: s / seconds[plain] for f, s in seconds.items() if f != plain}
        append_row(
            "micro",
            {
                "family": family,
                "shape": shape,
                "N": N,
                "V": V,
                **{f"{form}_over_{plain}": float(f"{ratio:.4g}") for form, ratio in own.items()},
                "seconds": {form: float(f"{s:.4g}") for form, s in seconds.items()},
            },
        )
        print(f"{family:13} {shape:14}", "  ".join(f"{f} {r:.2f}" for f, r in own.items()))
        for form, ratio in own.items():
            key = f"{family}_{form}_over_{plain}"
            worst[key] = max(worst.get(key, 0.0), ratio)
    return worst


def repeat(function: Callable[[], object], count: int) -> None:
    for _ in range(count):
        function()


def auto_over_best(repeats: int = 7) -> float:
    """The largest ratio of "auto"'s time to the faster route's over `GRID`, interleaved."""
    found = {}
    for t, d in GRID:
        act, val_act = random(N + V, t, d).split((N, V))
        grad, val_grad = random(N + V, t, d).flip(2).split((N, V))
        flat = [x.double().flatten(0, 1) for x in (val_act, val_grad)]
        direction = flat[1].t() @ flat[0]
        dots = ((act.double() @ direction.t()) * grad.double()).sum((1, 2))
        methods = {
            method: functools.partial(
                gk.linear_ghost_dot, val_act, val_grad, act, grad, method=method
            )
            for method in ("auto", "gram", "direction")
        }
        counts = {}
        for method, run in methods.items():
            right(run(), dots)
            start = time.perf_counter()
            run()
            counts[method] = 1 + int(0.02 / (time.perf_counter() - start))
        calls = max(counts.values())  # short ones several times, beyond a clock's noise
        several = {m: functools.partial(repeat, run, calls) for m, run in methods.items()}
        seconds = {m: s / calls for m, s in interleave(several, repeats).items()}
        best = min(seconds["gram"], seconds["direction"])
        found[f"t{t}-{d}x{d}"] = seconds["auto"] / best
        line = "  ".join(f"{method} {s * 1e3:.3f} ms" for method, s in seconds.items())
        print(f"{'auto':13} {f't{t}-{d}x{d}':14} {line}", flush=True)
    rounded = {shape: float(f"{ratio:.4g}") for shape, ratio in found.items()}
    append_row("micro", {"family": "auto", "N": N, "V": V, "auto_over_best": rounded})
    return max(found.values())


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmarks.json"
        options = ["--benchmark-max-time=0.3", "--benchmark-warmup=on", "--benchmark-sort=name"]
        columns = "--benchmark-columns=median,iqr,rounds"
        status = pytest.main(
            [__file__, *options, columns, f"--benchmark-json={path}", *sys.argv[1:]]
        )
        if status != 0:
            print("no figures, for not all results are right", file=sys.stderr)
            return int(status)
        worst = ratios(json.loads(path.read_text())["benchmarks"])
    worst["auto_over_best"] = auto_over_best()
    print(" ".join(f"{key}={value:.2f}" for key, value in worst.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
