"""What the benchmarks share: interleaved timing, and one row a run in bench/results/."""

import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleave(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median time of every function, in seconds, over `repeats` rounds of all of them.

    A round runs each function once, so that a machine that slows down for a while slows all of
    them; every other round runs backwards, so that none always follows the same neighbour. One
    round before them is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for round_ in range(repeats + 1):
        for name in names if round_ % 2 else reversed(names):
            _synchronize()
            start = time.perf_counter()
            result = functions[name]()
            _synchronize()
            seconds = time.perf_counter() - start
            del result  # outside the time: freeing a large result is no function's own work
            if round_ > 0:
                times[name].append(seconds)
    return {name: statistics.median(t) for name, t in times.items()}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit measured, with "+" if the tree differs from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=10"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def append_row(name: str, row: dict[str, Any]) -> None:
    """Append `row`, and what identifies the run, to bench/results/<name>.jsonl."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    run = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as f:
        f.write(json.dumps(run | row) + "\n")
