"""The demonstration corpus: four domains, repeatable, with answers that are right."""

import json
import re

import pytest
from graddot_lm.errors import GraddotError
from graddot_lm.text import demo_corpus
from graddot_lm.text.demo_corpus import collect, split_text

NAMES = ["Python source", "Python docs", "Licences", "Arithmetic"]


def read(path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_four_domains_in_the_pile_format(tmp_path):
    written = collect(tmp_path / "new" / "demo", max_mb_per_domain=0.1)
    assert list(written) == NAMES
    for name, entry in written.items():
        rows = read(entry["file"])
        assert len(rows) == entry["documents"] > 0
        assert all(row["meta"] == {"pile_set_name": name} for row in rows)
        assert all(row["text"].strip() for row in rows)
        sizes = [len(row["text"].encode()) for row in rows]
        assert sum(sizes) == entry["bytes"]
        # The last document is the one that reaches the limit, if any does.
        assert sum(sizes[:-1]) < 100_000


def test_domains_hold_what_they_say(tmp_path):
    written = collect(tmp_path, max_mb_per_domain=0.5)
    texts = {name: "\n".join(r["text"] for r in read(e["file"])) for name, e in written.items()}
    assert "import " in texts["Python source"] and "def " in texts["Python source"]
    assert "statement" in texts["Python docs"]
    assert re.search("licen[cs]e", texts["Licences"], re.IGNORECASE)
    assert "Solve " in texts["Arithmetic"]


def test_repeatable_and_seeded(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        collect(tmp_path / name, max_mb_per_domain=0.05, seed=seed)
    first, again, other = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "abc"
    )
    assert first == again
    assert [name for name in first if first[name] != other[name]] == ["arithmetic.jsonl"]


def test_licences_are_different_texts():
    texts = list(demo_corpus.licences())
    assert len(texts) == len(set(texts)) > 1


def test_split_text_keeps_everything():
    text = "\n\n".join("x" * n for n in (10, 50, 200, 0, 30, 30, 5))
    parts = list(split_text(text, size=80))
    assert "\n\n".join(parts) == text
    assert [len(part) for part in parts] == [62, 200, 71]
    assert list(split_text("")) == [""]


def answer(question: str) -> str:
    """Solve an exercise from its wording alone."""
    numbers = [int(word) for word in re.findall(r"-?\d+", question)]
    first, *rest = numbers
    if question.startswith("Calculate"):
        return str(eval(question[len("Calculate ") : -1]))
    if question.startswith("Multiply"):
        return str(first * rest[0])
    if question.startswith("Divide"):
        return str(first // rest[0])
    if question.startswith("Solve"):
        return str((rest[1] - rest[0]) // first)
    if question.startswith("What is the remainder"):
        return str(first % rest[0])
    if question.startswith("Is"):
        return str(first % rest[0] == 0)
    assert question.startswith("What is next")
    return str(2 * rest[2] - rest[1])


def test_arithmetic_answers():
    texts = demo_corpus.arithmetic(3)
    openings = set()
    for _ in range(40):
        lines = next(texts).splitlines()
        for question, given in zip(lines[::2], lines[1::2], strict=True):
            openings.add(
                " ".join(question.split()[:3]) if question[0] == "W" else question.split()[0]
            )
            assert given == answer(question), question
    assert len(openings) == 7  # one a kind of exercise


def test_missing_source_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_corpus.sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    with pytest.raises(GraddotError, match="'Python source': no text found"):
        collect(tmp_path / "out")
    with pytest.raises(GraddotError, match="must be above 0"):
        collect(tmp_path / "out", max_mb_per_domain=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(GraddotError, match="cannot be written"):
        collect(tmp_path / "file" / "out")


def test_command_line(tmp_path, capsys):
    assert demo_corpus.main([f"--output={tmp_path}", "--max_mb_per_domain=0.01"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}: " in shown for name in NAMES)
    with pytest.raises(SystemExit) as ended:
        demo_corpus.main([f"--output={tmp_path}", "--max_mb_per_domain=0"])
    assert ended.value.code == 2 and "must be above 0" in capsys.readouterr().err
