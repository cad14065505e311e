"""The README's own example runs as it stands."""

from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_first_example_runs(capsys):
    code = README.read_text().split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102 (our own text)
    assert capsys.readouterr().out.count("tensor(") == 3
