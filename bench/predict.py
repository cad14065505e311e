"""What a step costs, from counted operations and bytes and measured rates: the tables of
docs/scaling.md. `python bench/predict.py` prints them.

A decoder layer of width d with a feed-forward of width f has 4d² + 3df (gated) or 4d² + 2df weights.
A step on R rows of T tokens does 6 · weights · R · T operations in products and 6 · d · R · T² in
causal attention a layer (forward and twice that backward, half of the square). GradDotProd on N
training and V validation rows does the step on N + V rows and, for every sample, one product of the
weight gradient with the direction: 2 · N · weights operations, whose direction is read once a
sample from memory (4 bytes a weight; the gradient itself is in registers). With given directions the
V rows fall away and the direction, sharded like the weights and in fp32, has to be gathered once a
step, for which the backward waits.
"""

import json
from dataclasses import dataclass

from _report import RESULTS


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    width: int
    feed_forward: int
    vocab: int
    gated: bool = True

    @property
    def layer_weights(self) -> int:
        return 4 * self.width**2 + (3 if self.gated else 2) * self.width * self.feed_forward

    @property
    def weights(self) -> int:
        """In matrix products: all layers and the head."""
        return self.layers * self.layer_weights + self.vocab * self.width


@dataclass(frozen=True)
class Machine:
    """Rates that are reached, not peaks: operations/s, bytes/s of memory, and bytes/s of network
    within a node of eight and beyond it."""

    name: str
    flops: float
    memory: float
    node: float = 1.0
    network: float = 1.0


MODELS = [
    Model("1B", 16, 2048, 8192, 128_256),
    Model("7B", 32, 4096, 11008, 32_000),
    Model("70B", 80, 8192, 28672, 128_256),
]
# An H100 in bf16: half of 989 TFLOP/s, nine tenths of 3.35 TB/s, and four fifths of NVLink's 450 GB/s
# and of a 400 Gb/s port.
H100 = Machine("H100", 0.5 * 989e12, 0.9 * 3.35e12, 0.8 * 450e9, 0.8 * 50e9)
CPU_MODEL = Model("bench", 4, 768, 3072, 50_257, gated=False)


def step_seconds(model: Model, machine: Machine, rows: int, t: int) -> float:
    """Forward and backward of `rows` rows, without communication."""
    attention = 6 * model.layers * model.width * rows * t * t
    return (6 * model.weights * rows * t + attention) / machine.flops


def dots_seconds(model: Model, machine: Machine, n: int) -> float:
    """The boundary products of n samples: operations hide behind the reads of the direction."""
    return n * model.weights * max(2 / machine.flops, 4 / machine.memory)


def gather_seconds(model: Model, machine: Machine, gpus: int, times: int, width: int) -> float:
    """FSDP gathers (or scatters) of all weights, `width` bytes each, `times` a step."""
    rate = machine.node if gpus <= 8 else machine.network
    return times * width * model.weights * (gpus - 1) / gpus / rate


def fsdp_row(model: Model, gpus: int, n: int, v: int, t: int) -> list[str]:
    """Over regular training on the N rows: riding along, and a direction given."""
    # Weights are gathered for the forward and the backward, gradients scattered, in bf16.
    regular_net = gather_seconds(model, H100, gpus, 3, 2)
    regular = max(step_seconds(model, H100, n, t), regular_net)
    dots = dots_seconds(model, H100, n)
    riding = max(step_seconds(model, H100, n + v, t) + dots, regular_net)
    given = max(step_seconds(model, H100, n, t) + dots, regular_net)
    given += gather_seconds(model, H100, gpus, 1, 4)
    values = [regular * 1e3, regular_net * 1e3, riding / regular, given / regular]
    cells = [model.name, str(gpus), str(n), f"{values[0]:.0f}", f"{values[1]:.0f}"]
    return [*cells, f"{values[2]:.3f}", f"{values[3]:.3f}", f"{dots / regular:.4f}"]


def print_table(head: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def predicted_cpu(n: int, v: int, t: int) -> float:
    """GradDotProd over Regular on N+V rows, both with the fused head, at this machine's rates."""
    machine = Machine("CPU", 140e9, 15e9)
    step = step_seconds(CPU_MODEL, machine, n + v, t)
    # In the compiled kernel the direction's reads run beside the product; what is left is the
    # boundary's own work: three loads and a store of every element in registers.
    boundary = n * CPU_MODEL.weights * 4 / 50e9
    return (step + boundary) / step


def main() -> None:
    head = ["model", "GPUs", "N a GPU", "regular ms", "of it network ms", "riding along V=1"]
    head += ["given direction", "dots alone"]
    rows = [
        fsdp_row(model, gpus, n, 1, 4096)
        for model in MODELS
        for gpus in (8, 64, 1024)
        for n in (4, 16)
    ]
    print_table(head, rows)
    print()
    latest = {}
    path = RESULTS / "step.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        if "step_over_stock_nv" in row:
            latest[row["shape"]] = row
    cells = []
    for shape, row in latest.items():
        n, v, t = (int(part[1:]) for part in shape.split("-"))
        measured = row["step_over_regular_nv"]
        cells.append([shape, f"{predicted_cpu(n, v, t):.3f}", f"{measured:.3f}", row["commit"]])
    print_table(["shape, CPU", "predicted", "measured", "commit"], cells)


if __name__ == "__main__":
    main()
