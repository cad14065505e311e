"""What the benchmarks share: interleaved timing, and one row a run in bench/results/."""

import contextlib
import ctypes
import datetime
import functools
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


@functools.cache
def _gpu_counter() -> Callable[[], float] | None:
    """Joules since the driver was loaded, by NVIDIA's management library; None without it."""
    try:
        library, handle = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        identifier = f"GPU-{uuid.removeprefix('GPU-')}".encode()
        if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(
            identifier, ctypes.byref(handle)
        ):
            return None
    except (OSError, AttributeError):
        return None

    def joules() -> float:
        millijoules = ctypes.c_ulonglong()
        failed = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return float("nan") if failed else millijoules.value / 1000

    return joules


def joules(powercap: Path = Path("/sys/class/powercap")) -> float | None:
    """A running count of the energy of the GPU, or of the processors by Linux's power capping
    interface; None if the device does not report it."""
    if torch.cuda.is_available():
        counter = _gpu_counter()
        return None if counter is None else counter()
    try:
        packages = [p.read_text() for p in powercap.glob("intel-rapl:[0-9]*/energy_uj")]
    except PermissionError:
        return None
    return sum(map(int, packages)) / 1e6 if packages else None


def time_and_energy(
    functions: dict[str, Callable[[], object]],
    repeats: int,
    *,
    settle: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, float], dict[str, float] | None]:
    """The median time of every function, in seconds, and its mean energy, in joules, if the device
    reports it, over `repeats` rounds of all of them.

    A round runs each function once, so that a machine that slows down for a while slows all of
    them; every other round runs backwards, so that none always follows the same neighbour. One
    round before them is not counted. A GPU renews its count of energy some ten times a second: a mean
    of shorter functions needs many rounds. `settle` runs a function once more, uncounted, right before
    it is timed: for functions that find what they held the last time, unless another was between.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    energies: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for round_ in range(repeats + 1):
        for name in names if round_ % 2 else reversed(names):
            if settle:
                functions[name]()
            _synchronize()
            before, start = joules(), clock()
            result = functions[name]()
            _synchronize()
            seconds, after = clock() - start, joules()
            del result  # outside the time: freeing a large result is no function's own work
            if round_ > 0:
                times[name].append(seconds)
                if before is not None and after is not None and after >= before:
                    energies[name].append(after - before)
    seconds_by_name = {name: statistics.median(t) for name, t in times.items()}
    if not all(energies.values()):  # not reported, or a counter that began again
        return seconds_by_name, None
    return seconds_by_name, {name: statistics.mean(e) for name, e in energies.items()}


def interleave(
    functions: dict[str, Callable[[], object]], repeats: int, **options: Any
) -> dict[str, float]:
    """`time_and_energy` without the energy."""
    return time_and_energy(functions, repeats, **options)[0]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit measured, with "+" if the tree differs from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=10"]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError:  # a machine lent for minutes may have no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if not torch.cuda.is_available():
        return versions
    versions |= {"cuda": torch.version.cuda or torch.version.hip}
    with contextlib.suppress(ImportError):
        import triton

        versions["triton"] = triton.__version__
    return versions


def append_row(name: str, row: dict[str, Any]) -> None:
    """Append `row`, and what identifies the run, to bench/results/<name>.jsonl."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    run = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": _versions(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as f:
        f.write(json.dumps(run | row) + "\n")
