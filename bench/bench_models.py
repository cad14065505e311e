"""`make bench-models`: what scores add to a step, kind of model by kind of model.

    python bench/bench_models.py [--repeats 7] [--models llama mamba] [--wide]

Small models of 2 layers, 256 wide, fp32, N=8, V=1, T=128 tokens (Mamba: 32, for transformers' scan
without a kernel takes T² time) or images of 64x64: the step with scores over the regular one on the
same N+V rows, both with the fused head where the model can have it, interleaved in one run, medians,
on a CPU of the time of one thread, which other work on the machine changes less than what a clock shows;
and of the first step, with the checks that it runs, the time over that of a regular step, and the peak
memory, as in bench_step. The scores are checked against one float64 backward a sample first. --wide: 4
layers, 1024 wide, 32000 tokens, T=512.

Last line: the largest ratio of each kind, and whose it is.
"""

import argparse
import copy
import functools
import itertools
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from _report import append_row, interleave
from bench_step import DEVICE, DTYPE, TOLERANCE, Case, high_water_mark
from graddot_lm import fuse_head
from torch import Tensor, nn

N, V, CLASSES = 8, 1, 10
WIDE = ["--wide"] if "--wide" in sys.argv else []
LAYERS, WIDTH, HEADS, VOCABULARY, T = (4, 1024, 16, 32000, 512) if WIDE else (2, 256, 4, 8192, 128)
METHODS = ("regular_nv", "graddot")


def labels_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x, labels=y).loss


def own_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


@dataclass
class Kind:
    """How a model is made, and its step."""

    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = labels_loss
    fused: bool = False
    images: bool = False
    tokens: int = T

    def batch(self) -> tuple[Tensor, Tensor]:
        if self.images:
            return torch.randn(N + V, 3, 64, 64), torch.randint(0, CLASSES, (N + V,))
        ids = torch.randint(3, VOCABULARY, (N + V, self.tokens))
        return ids, ids


def hugging_face(kind: str, head: str = "ForCausalLM", **settings: object) -> nn.Module:
    common = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2,
        "head_dim": WIDTH // HEADS, "max_position_embeddings": T, "use_cache": False,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**common | settings)
    model: nn.Module = getattr(transformers, f"{kind}{head}")(config)
    return model


def bert() -> nn.Module:
    off = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    return hugging_face("Bert", "ForMaskedLM", **off)


def deberta() -> nn.Module:
    """As the third version: positions, without rows, go through layers that tokens go through."""
    return hugging_face(
        "DebertaV2", "ForMaskedLM", hidden_dropout_prob=0, attention_probs_dropout_prob=0,
        relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=64,
        norm_rel_ebd="layer_norm", share_att_key=True, position_biased_input=False,
    )  # fmt: skip


def t5() -> nn.Module:
    sizes = {"d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": 4 * WIDTH, "num_heads": HEADS}
    config = transformers.T5Config(
        vocab_size=VOCABULARY, num_layers=LAYERS, dropout_rate=0, decoder_start_token_id=0,
        use_cache=False, **sizes,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, image_size=64, patch_size=4, num_labels=CLASSES,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def lora() -> nn.Module:
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
    return peft.get_peft_model(hugging_face("Llama"), config)


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.GroupNorm(8, outputs), nn.GroupNorm(8, outputs)])
        self.skip = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(out)) + self.skip(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = [64, 64, 128, 256, 256]
        self.stem = nn.Conv2d(3, widths[0], 3, 1, 1)
        pairs = itertools.pairwise(widths)
        self.blocks = nn.Sequential(*(ResidualBlock(a, b, 1 + (b > a)) for a, b in pairs))
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.table(ids))[0])


class OwnNorm(nn.Module):
    """Of no known kind."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.abs().mean(-1, keepdim=True)) * self.scale + self.shift


class OwnBlock(nn.Module):
    """Factors of its own around its layers, as ConvNeXt and CaiT have them, and a bare matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([OwnNorm(), OwnNorm()])
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.inner = nn.Linear(WIDTH, 4 * WIDTH)
        self.outer = nn.Parameter(torch.randn(4 * WIDTH, WIDTH) / 32)
        self.factors = nn.ParameterList([torch.ones(WIDTH), torch.ones(WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.factors[0] * self.attention(y, y, y, need_weights=False)[0]
        return x + self.factors[1] * (F.gelu(self.inner(self.norms[1](x))) @ self.outer)


class OwnLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.positions = (
            nn.Embedding(VOCABULARY, WIDTH),
            nn.Parameter(torch.randn(T, WIDTH)),
        )
        self.blocks = nn.Sequential(*(OwnBlock() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.table(ids) + self.positions))


def causal(kind: str, **settings: object) -> Kind:
    return Kind(functools.partial(hugging_face, kind, **settings), fused=True)


MOE = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 2 * WIDTH}
KINDS = {
    "llama": causal("Llama"),
    "qwen3": causal("Qwen3"),
    "gemma2": Kind(functools.partial(hugging_face, "Gemma2")),  # caps its logits
    "gpt-neox": causal("GPTNeoX"),
    "opt": causal("OPT", ffn_dim=4 * WIDTH, word_embed_proj_dim=WIDTH, dropout=0.0),
    "bert": Kind(bert),
    "deberta": Kind(deberta),
    "t5": Kind(t5),
    "vit": Kind(vit, images=True),
    "resnet": Kind(ResNet, own_loss, images=True),
    "lstm": Kind(LSTM, own_loss),
    "mixtral": causal("Mixtral", **MOE),
    "mamba": Kind(functools.partial(hugging_face, "Mamba"), fused=True, tokens=32),
    "lora": Kind(lora, fused=True),
    "own-layers": Kind(OwnLayers, own_loss),
}


class ModelCase(Case):
    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.kind = KINDS[name]
        model = self.kind.make()
        super().__init__(model, functools.partial(self.kind.loss, model), *self.kind.batch(), N)

    def fuse(self) -> None:
        if self.kind.fused:
            fuse_head(self.model)

    def exact(self) -> Tensor:
        """The scores by one float64 backward a sample, (N,)."""
        model = copy.deepcopy(self.model).double()
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the default has no float64
        trained = [p for p in model.parameters() if p.requires_grad]
        x = self.x.double() if self.x.is_floating_point() else self.x

        def gradient(rows: slice) -> list[Tensor]:
            loss = self.kind.loss(model, x[rows], self.y[rows])
            grads = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
            return [g.flatten() for g in grads]

        val = gradient(slice(N, None))
        dots = [
            sum(torch.dot(g, d) for g, d in zip(gradient(slice(i, i + 1)), val, strict=True))
            for i in range(N)
        ]
        return torch.stack(dots)


def peak_memory(name: str, method: str) -> float:
    """MiB above the model's own, in a fresh process."""
    command = [sys.executable, __file__, *WIDE, "--memory_of", name, method]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak_memory(name: str, method: str) -> None:
    case = ModelCase(name)
    case.fuse()
    before = high_water_mark()
    case.methods[method]()
    print(high_water_mark() - before)


def measure(name: str, repeats: int) -> dict[str, float]:
    case = ModelCase(name)
    want = case.exact()
    case.fuse()
    clock = time.process_time if DEVICE == "cpu" else time.perf_counter
    start = clock()
    scores = case.methods["graddot"]()
    first = clock() - start
    error = ((scores - want).abs().max() / want.abs().max()).item()
    if not error < TOLERANCE[DTYPE]:
        raise SystemExit(f"{name}: scores are wrong, no figures: relative error {error:.1e}")
    methods = {method: case.methods[method] for method in METHODS}
    seconds = interleave(methods, repeats, clock=clock)
    memory = {method: peak_memory(name, method) for method in METHODS}
    row = {
        "step_over_regular_nv": seconds["graddot"] / seconds["regular_nv"],
        "first_over_regular_nv": first / seconds["regular_nv"],
        "mem_over_regular_nv": memory["graddot"] / memory["regular_nv"],
    }
    shape = {"layers": LAYERS, "width": WIDTH, "N": N, "V": V}
    shape |= {} if case.kind.images else {"vocabulary": VOCABULARY, "T": case.kind.tokens}
    measured = {"seconds": seconds, "memory_mib": memory, "error": error}
    append_row("models", {"model": name, "shape": shape, "repeats": repeats, **row, **measured})
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds of both steps")
    parser.add_argument("--models", nargs="+", choices=KINDS, default=list(KINDS), metavar="MODEL")
    parser.add_argument("--wide", action="store_true", help="larger models, of many minutes each")
    parser.add_argument("--memory_of", nargs=2, metavar=("MODEL", "METHOD"), help="used by itself")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")  # transformers'
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if args.memory_of:
        print_peak_memory(*args.memory_of)
        return
    rows = {}
    for name in args.models:
        if sys.stderr.isatty():
            print(f"{name} ({len(rows) + 1} of {len(args.models)}) …", file=sys.stderr)
        rows[name] = measure(name, args.repeats)
        print(
            f"{name:12}", "  ".join(f"{key} {x:.3f}" for key, x in rows[name].items()), flush=True
        )
    for key in next(iter(rows.values())):
        worst = max(rows, key=lambda name: rows[name][key])
        print(f"{key}={rows[worst][key]:.3f} {key}_of={worst}", end=" ")
    print()


if __name__ == "__main__":
    main()
