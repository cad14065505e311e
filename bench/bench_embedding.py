"""The embedding ops on a CPU beside plain PyTorch, in one interleaved run.

    python bench/bench_embedding.py [--repeats 15] [--samples 8] [--tokens 1024]

Baselines, as one would write them: the weight gradient by `index_add_` into zeros with the dots by
gathering the direction's rows; for the ghost dot, the val batch's gradient as a dense table. Ids
follow Zipf's law over GPT-2's vocabulary, as words of text do. Bytes that must move in
`embedding_wgrad_dot`: the gradient read once, the table's gradient written once, and the
direction's row of every id that occurs read once.

The last line gives the larger of both widths' time ratios; no figure is printed or stored if a
result is wrong.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from _report import append_row, interleave
from torch import Tensor

import graddot_kernels as gk

VOCABULARY = 50304
WIDTHS = (768, 1600)  # GPT-2's smallest and largest


def zipf_ids(samples: int, tokens: int) -> Tensor:
    frequency = 1 / torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    return torch.multinomial(frequency, samples * tokens, replacement=True).view(samples, tokens)


def torch_wgrad_dot(direction: Tensor, ids: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    weight_grad = torch.zeros(direction.shape)
    weight_grad.index_add_(0, ids.flatten(), grad.flatten(0, 1))
    return weight_grad, (direction[ids] * grad).sum((1, 2))


def dense_ghost_dot(val_ids: Tensor, val_grad: Tensor, ids: Tensor, grad: Tensor) -> Tensor:
    direction = torch.zeros(VOCABULARY, grad.shape[2])
    direction.index_add_(0, val_ids.flatten(), val_grad.flatten(0, 1))
    return (direction[ids] * grad).sum((1, 2))


def on_one_thread(function: Callable[[], object]) -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function()
    finally:
        torch.set_num_threads(threads)


def wrong(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().max() > 1e-4 * want.abs().max())


def measure(samples: int, tokens: int, width: int, repeats: int) -> dict[str, float] | None:
    """Median seconds of each form, None if their results differ."""
    torch.manual_seed(width)
    ids, val_ids = zipf_ids(samples, tokens), zipf_ids(samples, tokens)
    grad, val_grad = torch.randn(2, samples, tokens, width)
    direction = torch.randn(VOCABULARY, width)
    functions = {
        "wgrad": partial(gk.embedding_wgrad_dot, direction, ids, grad, VOCABULARY),
        "wgrad_torch": partial(torch_wgrad_dot, direction, ids, grad),
        "ghost": partial(gk.embedding_ghost_dot, val_ids, val_grad, ids, grad, VOCABULARY),
        "ghost_dense": partial(dense_ghost_dot, val_ids, val_grad, ids, grad),
        "direction": partial(gk.embedding_direction_dot, direction, ids, grad),
    }
    functions["wgrad_one_thread"] = partial(on_one_thread, functions["wgrad"])
    (weight_grad, dots), (want_grad, want_dots) = functions["wgrad"](), functions["wgrad_torch"]()
    if wrong(weight_grad, want_grad) or wrong(dots, want_dots):
        return None
    if wrong(functions["direction"](), want_dots):
        return None
    if wrong(functions["ghost"](), functions["ghost_dense"]()):
        return None
    del weight_grad, want_grad
    seconds = interleave(functions, repeats)
    moved = 4 * width * (samples * tokens + VOCABULARY + ids.unique().numel())
    return seconds | {"wgrad_GB_per_s": moved / seconds["wgrad"] / 1e9}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()
    wgrad_ratios, ghost_ratios = [], []
    for width in WIDTHS:
        figures = measure(args.samples, args.tokens, width, args.repeats)
        if figures is None:
            print(f"width {width}: results differ from PyTorch's; no figures", file=sys.stderr)
            return 1
        rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
        shape = {"N": args.samples, "T": args.tokens, "d": width, "vocabulary": VOCABULARY}
        append_row("embedding", {"shape": shape, **rounded})
        print(f"width {width}:", ", ".join(f"{name} {value}" for name, value in rounded.items()))
        wgrad_ratios.append(figures["wgrad"] / figures["wgrad_torch"])
        ghost_ratios.append(figures["ghost"] / figures["ghost_dense"])
    print(f"wgrad_over_torch={max(wgrad_ratios):.2f} ghost_over_dense={max(ghost_ratios):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
