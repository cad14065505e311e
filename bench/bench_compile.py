"""`make bench-compile`: what torch.compile gains, and what it takes at first, with scores and without.

    python bench/bench_compile.py [--repeats 15] [--compilations 3]

The GPT-2 of `make bench-options` with its head fused, N=8, V=1, T=256, fp32; a step is a forward, a backward
and `aggregate_and_log`, without the optimizer's; without scores it is of the same N+V rows. Interleaved in one
run, medians. The first compiled step is timed with nothing in the compiler's caches, by the default backend,
each time anew. The compiled scores are checked against one float64 backward a sample.

Last line: the ratios.
"""

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
from _report import append_row, interleave
from bench_options import SHAPE, N, T, loss_of, small_gpt2
from graddot_lm import GradDotProdEngine, fuse_head
from rivals import naive
from torch import Tensor, nn


class Steps:
    """Steps of four copies of one model: with and without scores, compiled and not."""

    def __init__(self) -> None:
        self.model = small_gpt2()
        self.ids = torch.randint(0, self.model.config.vocab_size, (N + 1, T))
        self._number = 0

    def regular(self) -> tuple[nn.Module, Callable[[], object]]:
        model = fuse_head(copy.deepcopy(self.model))

        def step() -> None:
            model.zero_grad(set_to_none=True)
            loss_of(model, self.ids, self.ids).backward()

        return model, step

    def scored(self) -> tuple[nn.Module, Callable[[], Tensor]]:
        model = fuse_head(copy.deepcopy(self.model))
        train, val = self.ids[:N], self.ids[N:]
        engine = GradDotProdEngine(model, (val, val))
        engine.attach()

        def step() -> Tensor:
            self._number += 1
            model.zero_grad(set_to_none=True)
            engine.attach_train_batch(train, train, self._number, torch.arange(N))
            loss_of(model, *engine.prepare_forward_input(train, train)).backward()
            engine.prepare_gradients()
            return engine.aggregate_and_log()

        step()  # is checked, and runs uncompiled
        return model, step

    def check(self, scores: Tensor) -> None:
        """Figures of wrong scores are worth nothing."""
        train, val = self.ids[:N], self.ids[N:]
        want = naive(copy.deepcopy(self.model).double(), loss_of, (train, train), (val, val))
        error = ((scores - want).abs().max() / want.abs().max()).item()
        if not error < 1e-4:
            raise SystemExit(f"compiled scores are wrong, no figures: error {error:.1e}")


def first_steps(
    steps: Steps, times: int
) -> tuple[dict[str, float], dict[str, Callable[[], object]]]:
    """Seconds of the first compiled step, the median of so many, and the last ones' steps."""
    seconds: dict[str, list[float]] = {"regular": [], "scored": []}
    for _ in range(times):
        torch.compiler.reset()
        compiled: dict[str, Callable[[], object]] = {}
        for name, (model, step) in (("regular", steps.regular()), ("scored", steps.scored())):
            model.compile()
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
            compiled[f"{name}_compiled"] = step
    return {f"{name}_first": statistics.median(x) for name, x in seconds.items()}, compiled


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds of all steps")
    parser.add_argument("--compilations", type=int, default=3, help="timed first steps")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")  # the compiler's, about caches
    torch.compiler.config.force_disable_caches = True
    steps = Steps()
    first, compiled = first_steps(steps, args.compilations)
    steps.check(compiled["scored_compiled"]())  # type: ignore[arg-type]
    functions = {"regular": steps.regular()[1], "scored": steps.scored()[1], **compiled}
    seconds = {**interleave(functions, args.repeats), **first}
    pairs = [
        ("scored", "regular"), ("scored_compiled", "regular_compiled"),
        ("regular_compiled", "regular"), ("scored_compiled", "scored"), ("scored_first", "regular_first"),
    ]  # fmt: skip
    ratios = {f"{a}_over_{b}": float(f"{seconds[a] / seconds[b]:.4g}") for a, b in pairs}
    rounded = {name: float(f"{s:.4g}") for name, s in seconds.items()}
    counts = {"repeats": args.repeats, "compilations": args.compilations}
    append_row("compile", {"shape": SHAPE, **counts, **ratios, "seconds": rounded})
    for name, s in seconds.items():
        print(f"{name:17} {s * 1e3:9.1f} ms")
    print(" ".join(f"{key}={value:.3f}" for key, value in ratios.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
