"""`make bench-step`: what a training step costs with scores, beside the same step without.

Interleaved in one run, medians: Regular on the N training rows, Regular on all N+V rows,
GradDotProd (N+V rows, scores for N), and the naive way (one backward a sample, dots by hand).
Peak memory is the process's high-water mark above what it held before the step, each method in
a process of its own. Correctness is checked first, against the naive way's dots.

Last line: worst case over the language-model shapes,
step_over_regular_nv, step_over_regular_n, mem_over_regular_nv, naive_over_step (smallest), and
naive_over_step_mlp.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _report import append_row, interleave
from graddot_lm import GradDotProdEngine
from graddot_lm.models import row_losses
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

LM_SHAPES = {"n8-v1-t256": (8, 1, 256), "n4-v1-t1024": (4, 1, 1024)}
MLP_SHAPE = (256, 1)  # N, V; T = 1


def lm_case(shape: str) -> "Case":
    n, v, t = LM_SHAPES[shape]
    torch.manual_seed(0)
    config = GPT2Config(n_layer=4, n_positions=t, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    config.use_cache = False
    model = GPT2LMHeadModel(config)
    ids = torch.randint(0, config.vocab_size, (n + v, t + 1))

    def loss(rows: Tensor, labels: Tensor) -> Tensor:
        return row_losses(model(rows).logits, labels).sum() / labels.numel()

    return Case(model, loss, ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), n)


def mlp_case() -> "Case":
    """A GPT-2 block's MLP, twice, as a classifier: T = 1 and many samples."""
    n, v = MLP_SHAPE
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768), nn.LayerNorm(768)]
    model = nn.Sequential(*layers, nn.Linear(768, 10))
    x, y = torch.randn(n + v, 768), torch.randint(0, 10, (n + v,))
    return Case(model, lambda rows, labels: F.cross_entropy(model(rows), labels), x, y, n)


class Case:
    """A model, its loss, and the joint batch; each method runs one forward and backward."""

    def __init__(self, model: nn.Module, loss: Callable, x: Tensor, y: Tensor, n: int) -> None:
        self.model, self.loss, self.x, self.y, self.n = model.train(), loss, x, y, n
        self.engine = GradDotProdEngine(model, (x[n:], y[n:]))
        self.methods: dict[str, Callable[[], Tensor | None]] = {
            "regular_n": lambda: self._regular(self.n),
            "regular_nv": lambda: self._regular(len(self.x)),
            "graddot": self._graddot,
            "naive": self._naive,
        }

    def _regular(self, rows: int) -> None:
        self.model.zero_grad(set_to_none=True)
        self.loss(self.x[:rows], self.y[:rows]).backward()

    def _graddot(self) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        train = self.x[: self.n], self.y[: self.n]
        self.engine.attach()
        self.engine.attach_train_batch(*train, 0, None)
        x, y = self.engine.prepare_forward_input(*train)
        self.engine.track_loss(self.loss(x, y)).backward()
        self.engine.prepare_gradients()
        scores = self.engine.aggregate_and_log()
        self.engine.detach()
        return scores

    def _naive(self) -> Tensor:
        parameters = list(self.model.parameters())
        val = torch.autograd.grad(self.loss(self.x[self.n :], self.y[self.n :]), parameters)
        total = [torch.zeros_like(p) for p in parameters]
        dots = torch.zeros(self.n, dtype=torch.float64)
        for i in range(self.n):
            loss = self.loss(self.x[i : i + 1], self.y[i : i + 1])
            grads = torch.autograd.grad(loss, parameters)
            for g, d, s in zip(grads, val, total, strict=True):
                dots[i] += torch.dot(g.view(-1), d.view(-1))
                s.add_(g, alpha=1 / self.n)
        return dots


def case_of(shape: str) -> Case:
    return mlp_case() if shape == "mlp" else lm_case(shape)


def check(case: Case) -> None:
    """Figures of a wrong result are worth nothing: compare scores with the naive way's."""
    scores, want = case.methods["graddot"](), case.methods["naive"]()
    assert scores is not None and want is not None
    error = ((scores - want).abs().max() / want.abs().max()).item()
    if not error < 1e-4:
        raise SystemExit(f"scores are wrong, no figures: relative error {error:.1e}")


def peak_memory(shape: str, method: str) -> float:
    """MiB above the model's own, in a fresh process."""
    command = [sys.executable, __file__, "--memory_of", shape, method]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def high_water_mark() -> float:
    """Peak resident memory of this process, MiB. (getrusage's would include the parent's.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def print_peak_memory(shape: str, method: str) -> None:
    case = case_of(shape)
    before = high_water_mark()
    case.methods[method]()
    print(high_water_mark() - before)


def measure(shape: str, repeats: int) -> dict[str, float]:
    case = case_of(shape)
    check(case)
    for method in ("regular_n", "regular_nv"):
        case.methods[method]()
    seconds = interleave(case.methods, repeats)
    row = {
        "step_over_regular_nv": seconds["graddot"] / seconds["regular_nv"],
        "step_over_regular_n": seconds["graddot"] / seconds["regular_n"],
        "naive_over_step": seconds["naive"] / seconds["graddot"],
    }
    if shape != "mlp":
        memory = {m: peak_memory(shape, m) for m in ("regular_nv", "graddot")}
        row["mem_over_regular_nv"] = memory["graddot"] / memory["regular_nv"]
    append_row("step", {"shape": shape, "repeats": repeats, **row, "seconds": seconds})
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds of all methods")
    shapes = [*LM_SHAPES, "mlp"]
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=shapes, help="default: all")
    parser.add_argument("--memory_of", nargs=2, metavar=("SHAPE", "METHOD"), help="used by itself")
    args = parser.parse_args()
    if args.memory_of:
        print_peak_memory(*args.memory_of)
        return
    start = time.perf_counter()
    rows = {shape: measure(shape, args.repeats) for shape in args.shapes}
    for shape, row in rows.items():
        print(f"{shape:12}", "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    print(f"took {time.perf_counter() - start:.0f} s")
    lm = [rows[shape] for shape in LM_SHAPES if shape in rows]
    worst = {}
    if lm:
        for key in ("step_over_regular_nv", "step_over_regular_n", "mem_over_regular_nv"):
            worst[key] = max(row[key] for row in lm)
        worst["naive_over_step"] = min(row["naive_over_step"] for row in lm)
    if "mlp" in rows:
        worst["naive_over_step_mlp"] = rows["mlp"]["naive_over_step"]
    print(" ".join(f"{key}={value:.3f}" for key, value in worst.items()))


if __name__ == "__main__":
    main()
