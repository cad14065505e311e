"""The snippets of README and guide run as they stand, one after the other; the table is of all cells."""

import importlib.util
import re
import textwrap
from pathlib import Path

from grid_cells import SUBJECTS
from test_grid import LOOPS

README = Path(__file__).parent.parent / "README.md"
GUIDE = README.parent / "docs" / "guide.md"


def snippets() -> list[str]:
    """The Python ones, also inside of a list."""
    text = README.read_text() + GUIDE.read_text()
    found = re.findall(r"^( *)```python\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(code) for _, code in found]


def test_snippets_run(capsys):
    namespace: dict = {"__name__": "readme"}
    ran = 0
    for code in snippets():
        if "from trl" in code and importlib.util.find_spec("trl") is None:
            continue
        exec(compile(code, "README.md", "exec"), namespace)  # noqa: S102 (our own text)
        ran += 1
    assert ran >= 4
    assert capsys.readouterr().out.count("tensor(") == 3
    assert namespace["loss"] > 0 and namespace["dots"].shape == (4,)


def test_table_of_models_and_loops_is_whole():
    """A model or loop that is new to the tests needs `make test exactness`."""
    table = README.read_text().split("<!-- written by `make exactness` -->\n")[1]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert lines[0] == ["scored", *LOOPS]
    assert [line[0] for line in lines[2:]] == list(SUBJECTS)
    assert {len(line) for line in lines[2:]} == {len(LOOPS) + 2}
