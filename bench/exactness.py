"""`make exactness`: the relative errors that the last `make test` measured, as docs/exactness.md; those
of models in loops also as README.md's table.

    python bench/exactness.py REPORT    # of pytest --junitxml
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from _report import ROOT

sys.path.insert(0, str(ROOT / "tests"))
from grid_cells import SUBJECTS
from test_grid import LOOPS

GRID, MODELS = "test_grid", "test_models"
HEAD = """# Measured errors

The largest relative error of the scores in each test, against a float64 brute force with one
backward a sample, as `make exactness` wrote it. fp32 and fp64 are relative to the dot or a tenth of
its Cauchy-Schwarz scale; bf16 and fp16 to that scale; norms are relative, cosines absolute. Models
that compute in fp32 whatever their parameters are (RMS norms, losses) have fp64 errors around 1e-8.
The table of models in loops is in README.md.
"""
GRID_BEGIN, GRID_END = "<!-- written by `make exactness` -->\n", "<!-- end -->\n"


def properties(report: Path) -> Iterator[tuple[tuple[str, str], dict[str, list[str]]]]:
    """(file, test), and what it recorded."""
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        found: dict[str, list[str]] = {}
        for item in case.iter("property"):
            found.setdefault(item.get("name", ""), []).append(item.get("value", "nan"))
        yield (case.get("classname", "").split(".")[-1], case.get("name", "")), found


def recorded(report: Path) -> dict[tuple[str, str], float]:
    """(file, test) -> largest recorded relative error."""
    return {
        test: max(map(float, found["relative_error"]))
        for test, found in properties(report)
        if "relative_error" in found
    }


def grid_table(report: Path) -> list[str]:
    """Models by loops; a cell that is not possible has the number of its reason."""
    cells = {found["cell"][0]: found for _, found in properties(report) if "cell" in found}
    columns, reasons = ["scored", *LOOPS], dict[str, int]()
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for model in SUBJECTS:
        row = [model, *cells[f"{model}/step"]["coverage"]]
        for loop in LOOPS:
            found = cells[f"{model}/{loop}"]
            if "not_possible" in found:
                number = reasons.setdefault(found["not_possible"][0], len(reasons) + 1)
                row.append(f"({number})")
            else:
                worst = max(map(float, found["relative_error"]))
                row.append(f"{worst:.0e}".replace("e-0", "e-"))
        lines.append("| " + " | ".join(row) + " |")
    notes = [f"({number}) not possible: {text}" for text, number in reasons.items()]
    return [*lines, "", "; ".join(notes) + "."]


def write_grid(lines: list[str]) -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(GRID_BEGIN)
    after = rest.split(GRID_END)[1]
    readme.write_text(before + GRID_BEGIN + "\n".join(lines) + "\n" + GRID_END + after)


def models_table(errors: dict[tuple[str, str], float]) -> list[str]:
    columns = ("fp32", "fp64", "bf16")
    rows: dict[str, dict[str, float]] = {}
    for (file, test), error in errors.items():
        match = re.fullmatch(r"test_(\w+)\[(.+?)(?:-(fp32|fp64))?\]", test)
        if file == MODELS and match and (match[3] or match[1] == "bf16"):
            rows.setdefault(match[2], {})[match[3] or "bf16"] = error
    lines = ["| model | " + " | ".join(columns) + " |", "|---" * 4 + "|"]
    for model in sorted(rows):
        cells = [f"{rows[model][c]:.1e}" if c in rows[model] else "" for c in columns]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return lines


def loops_table(errors: dict[tuple[str, str], float]) -> list[str]:
    lines = ["| test | cases | largest error |", "|---|---|---|"]
    tests: dict[str, list[float]] = {}
    for (file, test), error in errors.items():
        precision = re.search(r"-fp(32|64)\]$|^test_bf16", test)
        if file != GRID and not (file == MODELS and precision):
            tests.setdefault(f"{file}: {test.split('[')[0][5:].replace('_', ' ')}", []).append(
                error
            )
    return lines + [f"| {name} | {len(e)} | {max(e):.1e} |" for name, e in sorted(tests.items())]


def main(report: Path) -> int:
    if not report.exists():
        print(f"exactness: there is no {report}; run `make test`, which writes it", file=sys.stderr)
        return 1
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    wrong = sum(int(suite.get(kind, "0")) for suite in suites for kind in ("failures", "errors"))
    if wrong:
        print(f"exactness: {wrong} tests of {report} failed; nothing is written", file=sys.stderr)
        return 1
    errors = recorded(report)
    write_grid(grid_table(report))
    parts = [HEAD, "## Models by precision\n", *models_table(errors)]
    parts += ["\n## Other tests\n", *loops_table(errors)]
    (ROOT / "docs" / "exactness.md").write_text("\n".join(parts) + "\n")
    print(f"docs/exactness.md and README.md: {len(errors)} recorded errors")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
