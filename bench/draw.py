"""Draws bench/results/methods.jsonl into docs/: one figure a device and sweep, the latest rows.

python bench/draw.py          # needs matplotlib
"""

import json
import re
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.fonttype"] = "none"
matplotlib.rcParams["svg.hashsalt"] = "graddot"  # the same rows draw the same file
import matplotlib.pyplot as plt
from _report import RESULTS, ROOT


def latest_rows() -> dict[tuple[str, str, str], dict[int, dict[str, Any]]]:
    """(device, architecture, sweep) -> value of what is swept -> its last row."""
    found: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for line in (RESULTS / "methods.jsonl").read_text().splitlines():
        row = json.loads(line)
        key = row["device"], row["architecture"], row["sweep"]
        found.setdefault(key, {})[row[row["sweep"]]] = row
    return found


def draw(key: tuple[str, str, str], rows: dict[int, dict[str, Any]]) -> str:
    """Time of a step over the stock step on N rows, by method; returns the file's name."""
    device, architecture, sweep = key
    figure, axes = plt.subplots(figsize=(6, 4))
    values = sorted(rows)
    for method in rows[values[0]]["seconds"]:
        at = [v for v in values if method in rows[v]["seconds"]]
        ratios = [rows[v]["seconds"][method] / rows[v]["seconds"]["stock N"] for v in at]
        ours = method == "GradDotProd"
        axes.plot(at, ratios, marker="o", linewidth=3 if ours else 1, label=method)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(values, [str(v) for v in values])
    axes.set_xlabel(sweep)
    axes.set_ylabel("time / stock step on N rows")
    base = rows[values[0]]
    fixed = ", ".join(f"{name}={base[name]}" for name in "NVTK" if name != sweep)
    axes.set_title(f"{architecture}, {fixed}, {device}")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    slug = re.sub("[^a-z0-9]+", "-", f"{device} {architecture} {sweep}".lower())
    figure.savefig(ROOT / "docs" / f"{slug}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return f"docs/{slug}.svg"


if __name__ == "__main__":
    (ROOT / "docs").mkdir(exist_ok=True)
    for key, rows in latest_rows().items():
        print(draw(key, rows))
