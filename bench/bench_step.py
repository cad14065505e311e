"""`make bench-step`: what a training step costs with scores, beside the same step without.

Interleaved in one run, medians: stock (Hugging Face's own head and loss) on the N training rows and
on all N+V rows, Regular (fused head and GELU) on the same, GradDotProd (fused head, N+V rows,
scores for N), and the naive way (stock, one backward a sample, dots by hand). Peak memory is the
high-water mark of the process, or of what is allocated on the GPU, above what was held before the
step, each method in a process of its own. Correctness is checked first, against the naive way's
dots.

On a CPU a GPT-2 of 4 layers and 50304 tokens in fp32, with --autocast under autocast in bf16; on a
GPU GPT-2 Small in bf16.

Last line: worst case over the language-model shapes, the largest ratio of each kind (of
naive_over_step the smallest), naive_over_step_mlp, k16_over_k1: sixteen val rows as sixteen targets
over the same rows as one, and host_over_regular_nv: the step over Regular in a GPT-2 of 12 layers so
narrow that little but the host's own work is left, which bounds the step on a fast GPU;
host_compiled_over_regular_nv is the same of 4 such layers and both methods compiled.
"""

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _report import append_row, interleave, time_and_energy
from graddot_lm import GradDotProdEngine, fuse_head, unfuse_head
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE, LAYERS = (torch.bfloat16, 12) if DEVICE == "cuda" else (torch.float32, 4)
VOCABULARY = 50257 if DEVICE == "cuda" else 50304  # GPT-2's, and that padded to whole cache lines
LM_SHAPES = {"n8-v1-t256": (8, 1, 256), "n4-v1-t1024": (4, 1, 1024)}  # N, V, T
if DEVICE == "cuda":
    LM_SHAPES = {"n16-v1-t1024": (16, 1, 1024), "n16-v8-t1024": (16, 8, 1024)}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest score
MLP_SHAPE = (256, 1)  # N, V; T = 1
TARGETS_SHAPE = (8, 16, 256)
NARROW = {"n_layer": 12, "n_embd": 16, "n_head": 2, "vocab_size": 64}


class Case:
    """A model, its loss, and the joint batch; each method runs one forward and backward."""

    def __init__(self, model: nn.Module, loss: Callable, x: Tensor, y: Tensor, n: int) -> None:
        self.model, self.loss, self.n = model.to(DEVICE, DTYPE).train(), loss, n
        self.x, self.y = x.to(DEVICE), y.to(DEVICE)
        x, y = self.x, self.y
        self.engine = GradDotProdEngine(model, (x[n:], y[n:]))
        self.methods: dict[str, Callable[[], Tensor | None]] = {
            "regular_n": lambda: self._regular(self.n),
            "regular_nv": lambda: self._regular(len(self.x)),
            "graddot": lambda: self._graddot(self.engine),
            "naive": self._naive,
        }

    def _regular(self, rows: int) -> None:
        self.model.zero_grad(set_to_none=True)
        self.loss(self.x[:rows], self.y[:rows]).backward()

    def _graddot(self, engine: GradDotProdEngine) -> Tensor:
        engine.attach()
        scores = self.attached_step(engine)
        engine.detach()
        return scores

    def attached_step(self, engine: GradDotProdEngine) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        train = self.x[: self.n], self.y[: self.n]
        engine.attach_train_batch(*train, 0, None)
        x, y = engine.prepare_forward_input(*train)
        engine.track_loss(self.loss(x, y)).backward()
        engine.prepare_gradients()
        return engine.aggregate_and_log()

    def _naive(self) -> Tensor:
        parameters = list(self.model.parameters())
        val = torch.autograd.grad(self.loss(self.x[self.n :], self.y[self.n :]), parameters)
        total = [torch.zeros_like(p) for p in parameters]
        dots = torch.zeros(self.n, dtype=torch.float64, device=DEVICE)
        for i in range(self.n):
            loss = self.loss(self.x[i : i + 1], self.y[i : i + 1])
            grads = torch.autograd.grad(loss, parameters)
            for g, d, s in zip(grads, val, total, strict=True):
                dots[i] += torch.dot(g.view(-1).float(), d.view(-1).float())
                s.add_(g, alpha=1 / self.n)
        return dots


class LanguageModelCase(Case):
    """A GPT-2 of Small's width and vocabulary, but for `sizes`."""

    def __init__(self, n: int, v: int, t: int, *, autocast: bool = False, **sizes: int) -> None:
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCABULARY, "n_layer": LAYERS} | sizes
        config = GPT2Config(
            n_positions=t, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False,
            bos_token_id=None, eos_token_id=None, **sizes,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
        model.loss_type = "ForCausalLM"  # what it gets anyway, but with a warning
        ids = torch.randint(0, config.vocab_size, (n + v, t), device=DEVICE)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
                return model(x, labels=y).loss

        super().__init__(model, loss, ids, ids, n)
        self.gelu = ACT2FN["gelu_pytorch_tanh"]
        self.methods = {
            "stock_n": lambda: self._regular(n),
            "stock_nv": lambda: self._regular(n + v),
            "regular_n": lambda: self._fused(lambda: self._regular(n)),
            "regular_nv": lambda: self._fused(lambda: self._regular(n + v)),
            "graddot": lambda: self._fused(lambda: self._graddot(self.engine)),
            "naive": self._naive,
        }

    def targets(self) -> dict[str, Callable[[], Tensor | None]]:
        """The val rows as one target, and each as its own."""
        each = {str(i): (x[None], x[None]) for i, x in enumerate(self.x[self.n :])}
        engines = {"k1": self.engine, f"k{len(each)}": GradDotProdEngine(self.model, each)}
        return {
            name: lambda engine=engine: self._fused(lambda: self._graddot(engine))
            for name, engine in engines.items()
        }

    def _fused(self, step: Callable[[], Tensor | None]) -> Tensor | None:
        """The step as `graddot train` builds the model: fused head, GELU in one kernel."""
        own = [block.mlp.act for block in self.model.transformer.h]
        self.model.forward = self.forward
        for block in self.model.transformer.h:
            block.mlp.act = self.gelu
        result = step()
        del self.model.forward
        for block, act in zip(self.model.transformer.h, own, strict=True):
            block.mlp.act = act
        return result

    @functools.cached_property
    def forward(self) -> Callable:
        """The model's forward with the fused head; made once, as a training run does."""
        fuse_head(self.model)
        forward = self.model.forward
        unfuse_head(self.model)
        return forward


def mlp_case() -> Case:
    """A GPT-2 block's MLP, twice, as a classifier: T = 1 and many samples."""
    n, v = MLP_SHAPE
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768), nn.LayerNorm(768)]
    model = nn.Sequential(*layers, nn.Linear(768, 10))
    x, y = torch.randn(n + v, 768, dtype=DTYPE), torch.randint(0, 10, (n + v,))
    return Case(model, lambda rows, labels: F.cross_entropy(model(rows), labels), x, y, n)


def measure_targets(repeats: int) -> dict[str, float]:
    methods = LanguageModelCase(*TARGETS_SHAPE).targets()
    one, each = (method() for method in methods.values())
    assert one is not None and each is not None
    if not (each.mean(0) - one).abs().max() < TOLERANCE[DTYPE] * one.abs().max():
        raise SystemExit("scores of sixteen targets do not add up, no figures")
    # The fused head keeps its memory between the steps of a run; the two need different tables.
    seconds = interleave(methods, repeats, settle=True)
    row = {"k16_over_k1": seconds["k16"] / seconds["k1"]}
    shape = {"shape": "n8-v16-t256", "vocabulary": VOCABULARY}
    append_row("step", {**shape, "repeats": repeats, **row, "seconds": seconds})
    return row


def measure_host(repeats: int) -> dict[str, float]:
    """Steps of a few milliseconds, so of more rounds; attached once, as a training run is."""
    case, other = (LanguageModelCase(4, 1, 8, **NARROW) for _ in range(2))
    check(case)
    fuse_head(other.model)
    other.engine.attach()
    methods = {name: case.methods[name] for name in ("stock_nv", "regular_nv")}
    methods["graddot"] = lambda: other.attached_step(other.engine)
    seconds = interleave(methods, 10 * repeats, settle=True)
    row = {"host_over_regular_nv": seconds["graddot"] / seconds["regular_nv"]}
    append_row("step", {"shape": "host", "repeats": 10 * repeats, **row, "seconds": seconds})
    return row


def measure_compiled_host(repeats: int) -> dict[str, float]:
    """The same of 4 layers, for which torch.compile takes a minute on a CPU, in both methods."""
    case, other = (LanguageModelCase(4, 1, 8, **NARROW | {"n_layer": 4}) for _ in range(2))
    check(case)
    for one in (case, other):
        fuse_head(one.model)
        one.model.compile()
    other.engine.attach()
    methods: dict[str, Callable[[], object]] = {
        "regular_nv": lambda: case._regular(len(case.x)),
        "graddot": lambda: other.attached_step(other.engine),
    }
    for method in methods.values():
        for _ in range(3):  # the first step with scores runs uncompiled
            method()
    seconds = interleave(methods, 10 * repeats, settle=True)
    row = {"host_compiled_over_regular_nv": seconds["graddot"] / seconds["regular_nv"]}
    append_row(
        "step", {"shape": "host-compiled", "repeats": 10 * repeats, **row, "seconds": seconds}
    )
    return row


def case_of(shape: str, autocast: bool) -> Case:
    return mlp_case() if shape == "mlp" else LanguageModelCase(*LM_SHAPES[shape], autocast=autocast)


def check(case: Case, dtype: torch.dtype = DTYPE) -> None:
    """Figures of a wrong result are worth nothing: compare scores with the naive way's."""
    scores, want = case.methods["graddot"](), case.methods["naive"]()
    assert scores is not None and want is not None
    error = ((scores - want).abs().max() / want.abs().max()).item()
    if not error < TOLERANCE[dtype]:
        raise SystemExit(f"scores are wrong, no figures: relative error {error:.1e}")


def peak_memory(shape: str, method: str, autocast: bool) -> float:
    """MiB above the model's own, in a fresh process."""
    command = [sys.executable, __file__, "--memory_of", shape, method]
    command += ["--autocast"] if autocast else []
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def high_water_mark() -> float:
    """Peak memory of this process, MiB. (getrusage's would include the parent's.)"""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def print_peak_memory(shape: str, method: str, autocast: bool) -> None:
    case = case_of(shape, autocast)
    before = high_water_mark()
    case.methods[method]()
    print(high_water_mark() - before)


def measure(shape: str, repeats: int, autocast: bool) -> dict[str, float]:
    case = case_of(shape, autocast)
    check(case, torch.bfloat16 if autocast else DTYPE)
    for method in case.methods:
        case.methods[method]()
    seconds, energy = time_and_energy(case.methods, repeats)
    row = {"naive_over_step": seconds["naive"] / seconds["graddot"]}
    for other in seconds.keys() - {"graddot", "naive"}:
        row[f"step_over_{other}"] = seconds["graddot"] / seconds[other]
    if shape != "mlp":
        methods = "stock_n", "regular_nv", "graddot"
        memory = {method: peak_memory(shape, method, autocast) for method in methods}
        for other in ("stock_n", "regular_nv"):
            row[f"mem_over_{other}"] = memory["graddot"] / memory[other]
    measured = {"seconds": seconds, "joules": energy}
    vocabulary = {} if shape == "mlp" else {"vocabulary": VOCABULARY}
    precision = {"autocast": "bf16"} if autocast else {}
    settings = {"shape": shape, **vocabulary, **precision, "repeats": repeats}
    append_row("step", {**settings, **row, **measured})
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    rounds = 7 if DEVICE == "cuda" else 3
    parser.add_argument("--repeats", type=int, default=rounds, help="timed rounds of all methods")
    shapes = [*LM_SHAPES, "mlp", "k16", "host", "host-compiled"]
    parser.add_argument("--shapes", nargs="+", choices=shapes, help="default: all")
    parser.add_argument(
        "--autocast", action="store_true", help=f"in bf16, of {' and '.join(LM_SHAPES)} alone"
    )
    parser.add_argument("--memory_of", nargs=2, metavar=("SHAPE", "METHOD"), help="used by itself")
    args = parser.parse_args()
    if args.memory_of:
        print_peak_memory(*args.memory_of, args.autocast)
        return
    args.shapes = args.shapes or (list(LM_SHAPES) if args.autocast else shapes)
    if args.autocast and not LM_SHAPES.keys() >= set(args.shapes):
        parser.error(f"--autocast is for {' and '.join(LM_SHAPES)}; given --shapes {args.shapes}")
    start = time.perf_counter()
    apart = {
        "k16": measure_targets,
        "host": measure_host,
        "host-compiled": measure_compiled_host,
    }
    rows = {
        shape: apart[shape](args.repeats)
        if shape in apart
        else measure(shape, args.repeats, args.autocast)
        for shape in args.shapes
    }
    for shape, row in rows.items():
        print(f"{shape:12}", "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    print(f"took {time.perf_counter() - start:.0f} s")
    lm = [rows[shape] for shape in LM_SHAPES if shape in rows]
    worst = {}
    if lm:
        worst = {
            key: (min if key == "naive_over_step" else max)(row[key] for row in lm) for key in lm[0]
        }
    if "mlp" in rows:
        worst["naive_over_step_mlp"] = rows["mlp"]["naive_over_step"]
    for shape in apart:
        worst |= rows.get(shape, {})
    print(" ".join(f"{key}={value:.3f}" for key, value in worst.items()))


if __name__ == "__main__":
    main()
