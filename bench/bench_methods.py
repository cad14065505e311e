"""`make bench-methods`: every way to the scores side by side, as N, V, T and K grow.

Interleaved in one run, medians, with the energy where the device reports it. Stock is Hugging
Face's own step without scores, on N rows and on N+V rows; Regular is ours without scores;
GradDotProd ours with them; then naive (one backward a sample), torch.func's vmap(grad), the
two-matmul ghost form with hooks, a direction product with a cached validation gradient, and Opacus'
per-sample gradients where it is installed. Every method's scores are checked against the naive way's
before anything is timed. Weights are untied and there is no dropout. Rows go to
bench/results/methods.jsonl; `bench/draw.py` draws them into docs/.
"""

import argparse
import copy
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _report import append_row, time_and_energy
from graddot_lm import GradDotProdEngine, fuse_head
from graddot_lm.training.architectures import ARCHITECTURES
from rivals import (
    cached_direction,
    naive,
    opacus_samples,
    two_matmuls,
    vmap_grad,
)
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

# (N, V, T, K), one of which varies in each sweep.
SWEEPS = {
    "N": [(n, 1, 256, 1) for n in (2, 4, 8, 16, 32)],
    "V": [(8, v, 256, 1) for v in (1, 2, 4, 8)],
    "T": [(8, 1, t, 1) for t in (16, 64, 256, 1024)],
    "K": [(8, 16, 256, k) for k in (1, 4, 16)],
}


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), y[:, 1:].flatten())


class Bench:
    """One model and batch; `methods` maps a name to a step that returns scores or None."""

    def __init__(self, architecture: str, shape: tuple[int, int, int, int], device: str) -> None:
        n, v, t, k = shape
        self.n, self.v, self.k = n, v, k
        torch.manual_seed(0)
        sizes: dict[str, Any] = ARCHITECTURES[architecture]
        config = GPT2Config(
            n_positions=t, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False,
            tie_word_embeddings=False, **sizes,
        )  # fmt: skip
        self.model = GPT2LMHeadModel(config).to(device)
        self.model.loss_type = "ForCausalLM"  # what it gets anyway, but with a warning
        ids = torch.randint(0, config.vocab_size, (n + v, t), device=device)
        self.train, self.val = (ids[:n], ids[:n]), (ids[n:], ids[n:])
        self.joint = ids, ids
        self.fused = fuse_head(copy.deepcopy(self.model))
        targets = {str(i): (x, x) for i, x in enumerate(torch.tensor_split(ids[n:], k))}
        self.engine = GradDotProdEngine(self.fused, targets if k > 1 else self.val)
        self.methods: dict[str, Callable[[], Tensor | None]] = {
            "stock N": lambda: self._plain(self.model, self.train),
            "stock N+V": lambda: self._plain(self.model, self.joint),
            "Regular N+V": lambda: self._plain(self.fused, self.joint),
            "GradDotProd": self._graddot,
        }
        if k == 1:
            self._add_rivals()

    def _add_rivals(self) -> None:
        args = loss_of, self.train, self.val
        # torch.func has no rule for the fused attention and would run it sample by sample.
        eager = copy.deepcopy(self.model)
        eager.set_attn_implementation("eager")
        for name, method, model in (
            ("naive", naive, self.model),
            ("vmap(grad)", vmap_grad, eager),
            ("two matmuls", two_matmuls, self.model),
            ("cached direction", cached_direction, self.model),
        ):
            self.methods[name] = lambda method=method, model=model: method(model, *args)
        if importlib.util.find_spec("opacus") is not None:
            from opacus.grad_sample import GradSampleModule

            sampled = GradSampleModule(copy.deepcopy(self.model), loss_reduction="mean")
            self.methods["Opacus"] = lambda: opacus_samples(sampled, *args)

    @staticmethod
    def _plain(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        model(batch[0], labels=batch[1]).loss.backward()

    def _graddot(self) -> Tensor:
        self.engine.attach()
        self.engine.attach_train_batch(*self.train, 0, None)
        x, y = self.engine.prepare_forward_input(*self.train)
        self.fused(x, labels=y).loss.backward()
        self.engine.prepare_gradients()
        scores = self.engine.aggregate_and_log()
        self.engine.detach()
        return scores

    def run(self, name: str) -> Tensor | None:
        self.model.zero_grad(set_to_none=True)
        self.fused.zero_grad(set_to_none=True)
        return self.methods[name]()

    def check(self) -> None:
        """Figures of wrong scores are worth nothing: no row without agreement."""
        want = naive(self.model, loss_of, self.train, self.val)
        for name in self.methods:
            scores = self.run(name)
            if scores is None:
                continue
            # A mean over targets of one size is the score of them all.
            got = scores if scores.dim() == 1 else scores.mean(0)
            error = ((got - want).abs().max() / want.abs().max()).item()
            if not error < 1e-3:
                raise SystemExit(f"{name}: scores are wrong, no figures: error {error:.1e}")


def peak_memory(bench: Bench, name: str) -> float | None:
    """MiB allocated above what is held before the step; on a GPU only."""
    if not torch.cuda.is_available():
        return None
    bench.run(name)
    bench.model.zero_grad(set_to_none=True)
    bench.fused.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    bench.methods[name]()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(
    architecture: str, sweep: str, shape: tuple[int, ...], repeats: int, device: str
) -> None:
    bench = Bench(architecture, shape, device)  # type: ignore[arg-type]
    bench.check()
    steps = {name: lambda name=name: bench.run(name) for name in bench.methods}
    seconds, energy = time_and_energy(steps, repeats)
    memory = {name: peak_memory(bench, name) for name in steps}
    row = {"architecture": architecture, "sweep": sweep, "repeats": repeats}
    row |= dict(zip("NVTK", shape, strict=True)) | {"seconds": seconds}
    row |= {"memory_mib": memory, "joules": energy}
    append_row("methods", row)
    ours = seconds["GradDotProd"]
    cells = "  ".join(f"{name} {s / ours:.2f}" for name, s in seconds.items())
    print(
        f"{architecture} N={shape[0]} V={shape[1]} T={shape[2]} K={shape[3]}: {cells}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architectures", nargs="+", default=["GPT2-Tiny"], choices=ARCHITECTURES)
    parser.add_argument("--sweeps", nargs="+", default=list(SWEEPS), choices=SWEEPS)
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds of all methods")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("time of each method over GradDotProd's")
    for architecture in args.architectures:
        for sweep in args.sweeps:
            for shape in SWEEPS[sweep]:
                measure(architecture, sweep, shape, args.repeats, device)


if __name__ == "__main__":
    main()
