"""`make bench-options`: what each of the engine's options adds to a step with scores.

    python bench/bench_options.py [--repeats 15]

One small GPT-2 (4 layers, 256 wide, a vocabulary of 8192), N=8, V=1, T=256, fp32; every step is a
forward, a backward and `aggregate_and_log`, without the optimizer's. Interleaved in one run, medians,
each over that of the step it extends, which `CASES` names. The scores of all of them are checked
against one float64 backward a sample first. "store" saves a part at every step, a hundred times as
often as `graddot train` does unless told otherwise.

Last line: the ratios.
"""

import argparse
import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _report import append_row, interleave
from graddot_lm import GradDotProdEngine, fuse_head, unfuse_head
from graddot_lm.background import BackgroundWriter
from graddot_lm.store import SCORES, PartWriter
from rivals import naive
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

N, T = 8, 256
SHAPE = {"layers": 4, "width": 256, "vocabulary": 8192, "N": N, "V": 1, "T": T}


@dataclass
class Case:
    """A step: the engine's options, None for a step without scores, and what it is compared with."""

    over: str = "plain"
    options: dict[str, Any] | None = field(default_factory=dict)
    val_rows: int = 1
    targets: bool = False  # every val row one of its own
    given: bool = False
    checkpointing: bool = False  # non-reentrant
    fused: bool = False
    store: type | None = None
    read: str | None = None  # a method of the engine whose result the option is for


# Without scores "regular" is the step on the same N+V rows.
CASES = {
    "regular": Case(options=None),
    "per_parameter": Case(options={"per_parameter": True}, read="parameter_dots"),
    "norms": Case(options={"norms": True}),
    "v4": Case(val_rows=4),
    "targets4": Case(over="v4", val_rows=4, targets=True),
    "given": Case(given=True),
    "per_token": Case(over="given", options={"per_token": True}, given=True, read="token_dots"),
    "store": Case(store=BackgroundWriter),
    "store_waiting": Case(store=PartWriter),
    "regular_checkpointing": Case(over="regular", options=None, checkpointing=True),
    "checkpointing": Case(checkpointing=True),
    "checkpointing_engine": Case(over="regular_checkpointing", checkpointing=True),
    "fused": Case(fused=True),
}


def small_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=8192, n_positions=T, n_embd=256, n_layer=4, n_head=4, use_cache=False,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    model.loss_type = "ForCausalLM"  # what it gets anyway, but with a warning
    return model


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x, labels=y).loss


class Bench:
    """The model, the batch, and one engine a case; `step` runs one step of a case."""

    def __init__(self, folder: Path) -> None:
        self.model = small_gpt2()
        self.ids = torch.randint(0, self.model.config.vocab_size, (N + 4, T))
        fuse_head(self.model)
        self.fused_forward = self.model.forward
        unfuse_head(self.model)
        self.folder, self.steps = folder, 0
        self.engines: dict[str, GradDotProdEngine] = {}
        self.writers: dict[str, Any] = {}
        self.cases = {"plain": Case(), **CASES}
        for name, case in self.cases.items():
            if case.options is not None:
                self.engines[name] = self._engine(name, case, case.options)

    def _engine(self, name: str, case: Case, options: dict[str, Any]) -> GradDotProdEngine:
        val = self.ids[N : N + case.val_rows]
        data: Any = {str(i): (x[None], x[None]) for i, x in enumerate(val)}
        data = data if case.targets else (val, val)
        engine = GradDotProdEngine(self.model, None if case.given else data, **options)
        if case.given:
            engine.set_directions(engine.compute_directions([data]))
        if case.store is not None:
            scores = self.folder / name
            scores.mkdir()
            writer = PartWriter(scores, SCORES)
            engine.store = writer if case.store is PartWriter else case.store(writer)
            self.writers[name] = engine.store
        return engine

    def step(self, name: str) -> Tensor | None:
        case, model = self.cases[name], self.model
        model.zero_grad(set_to_none=True)
        if case.fused:
            model.forward = self.fused_forward  # type: ignore[method-assign]
        if case.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            if case.options is None:
                loss_of(model, self.ids[: N + 1], self.ids[: N + 1]).backward()
                return None
            return self._scored(name)
        finally:
            model.__dict__.pop("forward", None)
            model.gradient_checkpointing_disable()

    def _scored(self, name: str) -> Tensor:
        engine, train = self.engines[name], self.ids[:N]
        self.steps += 1
        engine.attach()
        engine.attach_train_batch(train, train, self.steps, torch.arange(N))
        loss_of(self.model, *engine.prepare_forward_input(train, train)).backward()
        engine.prepare_gradients()
        if (read := self.cases[name].read) is not None:
            getattr(engine, read)()
        scores = engine.aggregate_and_log()
        engine.detach()
        if isinstance(writer := self.writers.get(name), BackgroundWriter):
            writer.flush(wait=False)
        elif writer is not None:
            writer.flush()
        return scores

    def check(self) -> None:
        """Figures of wrong scores are worth nothing."""
        exact = copy.deepcopy(self.model).double()
        train = self.ids[:N], self.ids[:N]
        for rows in (1, 4):
            val = self.ids[N : N + rows]
            want = naive(exact, loss_of, train, (val, val))
            for name, case in self.cases.items():
                if case.options is None or case.val_rows != rows:
                    continue
                scores = self.step(name)
                assert scores is not None
                got = scores.mean(0) if case.targets else scores  # targets of one size
                error = ((got - want).abs().max() / want.abs().max()).item()
                if not error < 1e-4:
                    raise SystemExit(f"{name}: scores are wrong, no figures: error {error:.1e}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds of all steps")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")  # transformers' about gradient checkpointing
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        bench.check()
        steps: dict[str, Callable[[], object]] = {
            name: lambda name=name: bench.step(name) for name in bench.cases
        }
        seconds = interleave(steps, args.repeats)
        for writer in bench.writers.values():
            writer.flush()
    ratios = {
        f"{name}_over_{case.over}": float(f"{seconds[name] / seconds[case.over]:.4g}")
        for name, case in bench.cases.items()
        if name != "plain"
    }
    rounded = {name: float(f"{s:.4g}") for name, s in seconds.items()}
    append_row("options", {"shape": SHAPE, "repeats": args.repeats, **ratios, "seconds": rounded})
    print(f"{'step':23} {'ms':>8}  over")
    for name, case in bench.cases.items():
        ratio = "" if name == "plain" else f"{seconds[name] / seconds[case.over]:.3f} {case.over}"
        print(f"{name:23} {seconds[name] * 1e3:8.1f}  {ratio}")
    print(" ".join(f"{key}={value:.3f}" for key, value in ratios.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
