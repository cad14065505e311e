"""`make exactness`: the relative errors that the tests measured, as docs/exactness.md.

Runs the tests that record one and fails if any test does.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from _report import ROOT

MODELS = "test_models"
FILES = (
    MODELS,
    "test_loops",
    "test_checkpointing",
    "test_directions",
    "test_norms_option",
    "test_hf",
    "test_distributed",
    "test_train_processes",
)
HEAD = """# Measured errors

The largest relative error of the scores in each test, against a float64 brute force with one
backward a sample, as `make exactness` wrote it. fp32 and fp64 are relative to the dot or a tenth of
its Cauchy-Schwarz scale; bf16 and fp16 to that scale; norms are relative, cosines absolute. Models that compute in fp32 whatever their
parameters are (RMS norms, losses) have fp64 errors around 1e-8.
"""


def recorded(report: Path) -> dict[tuple[str, str], float]:
    """(file, test) -> largest recorded relative error."""
    found: dict[tuple[str, str], float] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        for item in case.iter("property"):
            if item.get("name") == "relative_error":
                key = case.get("classname", "").split(".")[-1], case.get("name", "")
                found[key] = max(found.get(key, 0.0), float(item.get("value", "nan")))
    return found


def models_table(errors: dict[tuple[str, str], float]) -> list[str]:
    columns = ("fp32", "fp64", "bf16", "activation checkpointing")
    rows: dict[str, dict[str, float]] = {}
    for (file, test), error in errors.items():
        match = re.fullmatch(r"test_(\w+)\[(.+?)(?:-(fp32|fp64))?\]", test)
        if file == MODELS and match:
            kind = {"bf16": "bf16", "activation_checkpointing": columns[3]}
            rows.setdefault(match[2], {})[match[3] or kind.get(match[1], "fp32")] = error
    lines = ["| model | " + " | ".join(columns) + " |", "|---" * 5 + "|"]
    for model in sorted(rows):
        cells = [f"{rows[model][c]:.1e}" if c in rows[model] else "" for c in columns]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return lines


def loops_table(errors: dict[tuple[str, str], float]) -> list[str]:
    lines = ["| test | cases | largest error |", "|---|---|---|"]
    tests: dict[str, list[float]] = {}
    for (file, test), error in errors.items():
        if file != MODELS:
            tests.setdefault(f"{file}: {test.split('[')[0][5:].replace('_', ' ')}", []).append(
                error
            )
    return lines + [f"| {name} | {len(e)} | {max(e):.1e} |" for name, e in sorted(tests.items())]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        paths = [f"tests/{name}.py" for name in FILES]
        command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile"]
        done = subprocess.run([*command, f"--junitxml={report}", *paths], cwd=ROOT, check=False)
        if done.returncode:
            return done.returncode
        errors = recorded(report)
    parts = [HEAD, "## Models\n", *models_table(errors), "\n## Loops\n", *loops_table(errors)]
    (ROOT / "docs" / "exactness.md").write_text("\n".join(parts) + "\n")
    print(f"docs/exactness.md: {len(errors)} recorded errors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
