"""`graddot doctor`: what was built, and which code each op runs on each device."""

import argparse

import torch

import graddot_kernels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments: the report is the same whatever is asked."""


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)


def run(args: argparse.Namespace) -> int:
    info = graddot_kernels.build_info()
    routes = info.pop("routes")
    info["gpus"] = _gpus()
    texts = {k: ", ".join(v) if isinstance(v, list) else v for k, v in info.items()}
    _print_table([(key.replace("_", " "), text or "none") for key, text in texts.items()])
    print()
    devices = ("CPU", "CUDA")
    _print_table([("op", *devices), *((op, *map(r.get, devices)) for op, r in routes.items())])
    print()
    compiled = info["instruction_set"]
    who = f"the compiled library does ({compiled})" if compiled else "PyTorch does here"
    print(f"On the CPU the inner work of torch_impl's linear layers and loss: {who}.")
    return 0
