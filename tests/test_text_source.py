"""Where `graddot tokenize` finds documents: files, streams and lines that are fit or unfit."""

import errno
import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import zstandard
from graddot_lm.errors import GraddotError
from graddot_lm.text.text_source import find_sources, read_chunks
from tokenize_checks import GOOD, content, jsonl, small_bpe, tokenize


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    return small_bpe(tmp_path_factory.mktemp("bpe"))


BAD_LINES = {
    "not-json": b'{"text": ',
    "not-an-object": b"[1, 2]",
    "no-text": b'{"meta": {"pile_set_name": "x"}}',
    "text-not-a-string": b'{"text": 3, "meta": {"pile_set_name": "x"}}',
    "not-utf8": b'{"text": "\xff", "meta": {"pile_set_name": "x"}}',
    "half-a-surrogate-pair": rb'{"text": "\ud800", "meta": {"pile_set_name": "x"}}',
    "too-deep": b"[" * 100_000,
    "no-domain": b'{"text": "a"}',
    "domain-not-a-string": b'{"text": "a", "meta": {"pile_set_name": 3}}',
    "half-a-pair-in-the-domain": rb'{"text": "a", "meta": {"pile_set_name": "\ud800"}}',
}


@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line_is_named_or_skipped(tmp_path, bpe, bad, capsys):
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD + b"\n" + bad + b"\n" + GOOD)
    with pytest.raises(GraddotError, match=r"a\.jsonl:2: "):
        tokenize(file, tmp_path / "out", bpe)
    meta = tokenize(file, tmp_path / "out", bpe, skip_bad_lines=True)
    assert meta["bad_lines"] == 1 and meta["damaged_files"] == []
    assert capsys.readouterr().out.endswith(" tokens, 1 bad line skipped\n")
    assert sum(d[s]["documents"] for d in meta["domains"] for s in ("train", "val")) == 2


@pytest.mark.parametrize("text", [json.dumps([{"text": "a"}]), json.dumps({"text": "a"}, indent=2)])
def test_json_over_several_lines_or_in_an_array(tmp_path, bpe, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(GraddotError, match=r"a\.json:1: one JSON object a line was expected"):
        tokenize(tmp_path / "a.json", tmp_path / "out", bpe)
    count = len(text.splitlines())
    skipped = f"no document in .*a.json, {count} bad line{'s' * (count > 1)} skipped$"
    with pytest.raises(GraddotError, match=skipped):
        tokenize(tmp_path / "a.json", tmp_path / "out", bpe, skip_bad_lines=True)


def test_byte_order_marks_are_no_text(tmp_path, bpe):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + jsonl(range(5)) + mark + jsonl(range(5, 9)))
    (tmp_path / "b.jsonl").write_bytes(jsonl(range(9)))
    (tmp_path / "only.jsonl").write_bytes(mark)
    tokenize([tmp_path / "a.jsonl", tmp_path / "only.jsonl"], tmp_path / "marked", bpe)
    tokenize(tmp_path / "b.jsonl", tmp_path / "plain", bpe)
    assert content(tmp_path / "marked") == content(tmp_path / "plain")


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["truncated", "damaged"])
def test_broken_stream_names_the_file_and_what_is_lost(tmp_path, bpe, ending, damage, capsys):
    # Random letters, so that half of the stream holds about half of the documents.
    letters = np.random.default_rng(0).integers(97, 123, (1500, 300), np.uint8)
    text = b"".join(b'{"text": "%s"}\n' % row.tobytes() for row in letters)
    packed = gzip.compress(text) if ending == "gz" else zstandard.compress(text)
    file = tmp_path / f"b.jsonl.{ending}"
    file.write_bytes(packed[: len(packed) // 2] if damage == "truncated" else b"\0\1junk" + packed)
    (tmp_path / "c.jsonl").write_bytes(GOOD)
    inputs = [str(file), str(tmp_path / "c.jsonl")]
    with pytest.raises(GraddotError, match=rf"b\.jsonl\.{ending}:\d+: {damage}"):
        tokenize(inputs, tmp_path / "out", bpe, default_domain="x")
    given = {"default_domain": "x", "skip_bad_lines": True, "overwrite": True}
    meta = tokenize(inputs, tmp_path / "out", bpe, **given)
    read = sum(d[s]["documents"] for d in meta["domains"] for s in ("train", "val"))
    assert read == 1 if damage == "damaged" else 1 < read < 1500
    (lost,) = meta["damaged_files"]
    assert meta["bad_lines"] == 0 and (lost["name"], lost["line"]) == (str(file), read)
    closing = rf" tokens\n{file}: all from line {read} on is lost: {damage} \.{ending} stream.*\n$"
    assert re.search(closing, capsys.readouterr().out)

    # A run that goes on from behind the damage does not meet it again.
    sources = find_sources([str(file)])
    for position, records in [(read - 1, 1), (read, 0)]:
        (chunk,) = read_chunks(sources, 0, position)
        assert len(chunk.records) == records and chunk.line == read


def test_frames_that_follow_each_other_are_one_stream(tmp_path, bpe):
    skippable = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    halves = jsonl(range(50))[:1111], jsonl(range(50))[1111:]
    packed = skippable + b"".join(zstandard.compress(half) for half in halves)
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(gzip.compress(half) for half in halves))
    (tmp_path / "a.jsonl").write_bytes(b"".join(halves))
    tokenize(tmp_path / "a.jsonl", tmp_path / "plain", bpe)
    for ending in ("gz", "zst"):
        tokenize(tmp_path / f"a.jsonl.{ending}", tmp_path / ending, bpe)
        assert content(tmp_path / ending) == content(tmp_path / "plain")


def test_a_domain_that_is_no_string_is_not_the_default(tmp_path, bpe):
    """A dataset's labels are often numbers; all of them in one domain is not what they say."""
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 3}')
    options = {"domain_column": "label", "default_domain": "rest"}
    with pytest.raises(GraddotError, match="the domain at 'label' is of type int, not a string"):
        tokenize(tmp_path / "a.jsonl", tmp_path / "out", bpe, **options)


def test_text_that_would_be_read_twice_is_refused(tmp_path, monkeypatch):
    """One time a document may be for training, the other for validation."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl").symlink_to("in/a.jsonl")
    for inputs, words in [
        (["in", "in/a.jsonl"], "--input has in/a.jsonl twice; give"),
        (["in", "./in"], "--input has in/a.jsonl twice; give"),
        (["in", "b.jsonl"], "--input has b.jsonl twice, also as in/a.jsonl; give"),
        (["some/set", "in", "some/set"], "--input has some/set twice; give"),
    ]:
        with pytest.raises(GraddotError, match=words):
            find_sources(inputs)


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "shut").mkdir()
    (tmp_path / "open" / "a.jsonl").write_bytes(GOOD)
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("shut"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(GraddotError, match="shut: cannot be read: Permission denied"):
        find_sources([str(tmp_path)])


def test_links_in_a_folder_are_not_passed_over(tmp_path):
    """Each folder once: also where a link leads back to what it lies in."""
    (tmp_path / "in").mkdir()
    (tmp_path / "more" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "more" / "deep" / "b.jsonl").write_bytes(GOOD)
    (tmp_path / "in" / "link").symlink_to("../more")
    (tmp_path / "in" / "same").symlink_to("../more/deep")
    (tmp_path / "more" / "back").symlink_to("../in")
    found = [source.name for source in find_sources([str(tmp_path / "in")])]
    assert found == [f"{tmp_path}/in/a.jsonl", f"{tmp_path}/in/link/deep/b.jsonl"]
    (tmp_path / "more" / "gone.jsonl").symlink_to("nowhere")
    with pytest.raises(GraddotError, match=r"in/link/gone.jsonl: a link to what is not there"):
        find_sources([str(tmp_path / "in")])


def test_input_errors(tmp_path, bpe):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "none.jsonl").write_text("\n")
    cases = {
        "empty": "no .jsonl, .json or .ndjson file",
        "missing.jsonl": "no such file or folder",
        "missing/": "no such file or folder",
        "a.txt": "unknown file ending",
        "none.jsonl": "no document in",
    }
    for name, message in cases.items():
        with pytest.raises(GraddotError, match=message):
            tokenize(f"{tmp_path}/{name}", tmp_path / "out", bpe)


def test_a_file_beside_its_compressed_self_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(GOOD))
    for inputs in ([str(tmp_path)], [str(tmp_path / "a.jsonl"), str(tmp_path / "a.jsonl.zst")]):
        with pytest.raises(GraddotError, match=r"a.jsonl.zst twice, also as .*a.jsonl; give every"):
            find_sources(inputs)
