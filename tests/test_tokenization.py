"""`graddot tokenize` against a plain one-document-at-a-time encoding, and its ways to fail."""

import argparse
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import zstandard
from graddot_lm import tokenization
from graddot_lm.errors import GraddotError
from graddot_lm.tokenization import train_bpe
from tokenizers import Tokenizer, models, pre_tokenizers

DOMAINS = ["Pile-CC", "Wikipedia (en)", "GitHub"]


def document(n: int) -> dict:
    text = f"Document {n}. " + "some words, déjà vu, and more 漢字\n" * (n % 7)
    return {"text": text, "meta": {"pile_set_name": DOMAINS[n % 3]}}


def jsonl(numbers) -> bytes:
    return b"".join(json.dumps(document(n)).encode() + b"\n" for n in numbers)


def options(command="tokenize", **given) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    if command == "tokenize":
        tokenization.add_arguments(parser)
    else:
        tokenization.add_bpe_arguments(parser)
    words = []
    for key, value in given.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{key}"] if value is True else [f"--{key}", *map(str, values)]
    return parser.parse_args(words)


def tokenize(source, out, bpe, **given) -> dict:
    args = options(input=source, output=out, tokenizer=bpe, **{"workers": 2, **given})
    assert tokenization.run(args) == 0
    return json.loads((Path(out) / "meta.json").read_text())


def content(out) -> dict[str, bytes]:
    """Everything in a folder but meta.json's source names."""
    return {str(p.relative_to(out)): p.read_bytes() for p in Path(out).rglob("*.bin")}


def documents_in(path: Path, bpe, dtype="<u2") -> list[str]:
    tokenizer = Tokenizer.from_file(str(bpe))
    tokens = np.fromfile(path, dtype)
    ends = np.flatnonzero(tokens == tokenizer.token_to_id("<|endoftext|>"))
    assert not len(tokens) or ends[-1] == len(tokens) - 1
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(tokens, ends + 1)[:-1]]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "text.jsonl").write_bytes(jsonl(range(60)))
    assert train_bpe([str(folder / "text.jsonl")], 400, folder / "tokenizer.json") <= 400
    return folder / "tokenizer.json"


@pytest.fixture
def pile(tmp_path) -> Path:
    """Three files, one of each compression, holding documents 0 to 299 in sorted order."""
    folder = tmp_path / "pile"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(jsonl(range(100)))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(range(100, 200))))
    (folder / "sub" / "c.jsonl.zst").write_bytes(zstandard.compress(jsonl(range(200, 300))))
    (folder / "README.md").write_text("not text to read")
    return folder


def test_every_document_in_order_once(tmp_path, pile, bpe):
    meta = tokenize(pile, tmp_path / "out", bpe, val_fraction=0.2)
    assert [d["name"] for d in meta["domains"]] == DOMAINS
    assert [d["slug"] for d in meta["domains"]] == ["pile-cc", "wikipedia-en", "github"]
    assert meta["dtype"] == "uint16" and meta["eot_token_id"] == 0 and meta["bad_lines"] == 0
    assert [Path(s["name"]).name for s in meta["sources"]] == [
        "a.jsonl",
        "b.jsonl.gz",
        "c.jsonl.zst",
    ]
    held_out = 0
    for index, domain in enumerate(meta["domains"]):
        expected = [document(n)["text"] for n in range(index, 300, 3)]
        found = {}
        for split in ("train", "val"):
            path = tmp_path / "out" / domain["slug"] / f"{split}.bin"
            found[split] = documents_in(path, bpe)
            assert domain[split]["documents"] == len(found[split])
            assert domain[split]["tokens"] * 2 == path.stat().st_size
        held_out += len(found["val"])
        # Texts are different, so both splits merge into one order.
        rest = {split: iter([*texts, None]) for split, texts in found.items()}
        heads = {split: next(texts) for split, texts in rest.items()}
        for text in expected:
            split = "train" if heads["train"] == text else "val"
            assert heads[split] == text
            heads[split] = next(rest[split])
        assert heads == {"train": None, "val": None}
    assert 30 <= held_out <= 90  # 300 documents at 0.2: 60, give or take over 4 sigma
    assert not list((tmp_path / "out").glob("progress*"))


def test_result_depends_on_seed_but_not_on_workers_or_cuts(tmp_path, pile, bpe, monkeypatch):
    tokenize(pile, tmp_path / "one", bpe, workers=1)
    tokenize(pile, tmp_path / "other", bpe, workers=2, seed=1, val_fraction=0.3)
    monkeypatch.setattr(tokenization, "CHUNK_BYTES", 500)
    monkeypatch.setattr(tokenization, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(tokenization, "READ_BYTES", 77)
    tokenize(pile, tmp_path / "three", bpe, workers=3)
    assert content(tmp_path / "one") == content(tmp_path / "three")
    assert content(tmp_path / "one") != content(tmp_path / "other")


def test_max_tokens_is_exact_and_a_prefix(tmp_path, pile, bpe):
    tokenize(pile, tmp_path / "all", bpe)
    whole = content(tmp_path / "all")
    for limit in (1, 777, 2000):
        meta = tokenize(pile, tmp_path / f"cut{limit}", bpe, max_tokens=limit)
        counts = [d[split]["tokens"] for d in meta["domains"] for split in ("train", "val")]
        assert sum(counts) == limit
        for name, data in content(tmp_path / f"cut{limit}").items():
            assert whole[name].startswith(data[:-2])  # all but the eot of a cut document


def test_uint32_above_65536(tmp_path):
    vocabulary = {f"w{n}": n for n in range(70_000)} | {"<|endoftext|>": 70_000}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "w69999 w5 w65536"}\n')
    meta = tokenize(
        tmp_path / "a.jsonl", tmp_path / "out", tmp_path / "tokenizer.json", default_domain="x"
    )
    assert meta["dtype"] == "uint32" and meta["vocab_size"] == 70_001
    tokens = np.concatenate([np.fromfile(p, "<u4") for p in (tmp_path / "out").rglob("*.bin")])
    assert tokens.tolist() == [69999, 5, 65536, 70_000]


def test_special_token_in_text_does_not_end_a_document(tmp_path, bpe):
    text = "before <|endoftext|> after"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    tokenize(tmp_path / "a.jsonl", tmp_path / "out", bpe, default_domain="x", val_fraction=0)
    assert documents_in(tmp_path / "out" / "x" / "train.bin", bpe) == [text]


def test_columns_slugs_and_empty_lines(tmp_path, bpe):
    lines = [
        {"a": {"b": "one"}, "kind": "A b"},
        {"a": {"b": "two"}, "kind": "a-B"},
        {"a": {"b": "three"}, "kind": "漢"},
        {"a": {"b": ""}},
    ]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    given = {"text_column": "a.b", "domain_column": "kind", "default_domain": "rest"}
    meta = tokenize(tmp_path / "a.jsonl", tmp_path / "out", bpe, val_fraction=0, **given)
    slugs = {d["name"]: d["slug"] for d in meta["domains"]}
    assert slugs == {"A b": "a-b", "a-B": "a-b-2", "漢": "domain", "rest": "rest"}
    found = {
        slug: documents_in(tmp_path / "out" / slug / "train.bin", bpe) for slug in slugs.values()
    }
    assert found == {"a-b": ["one"], "a-b-2": ["two"], "domain": ["three"], "rest": [""]}


GOOD = json.dumps(document(0)).encode()
BAD_LINES = {
    "not-json": b'{"text": ',
    "not-an-object": b"[1, 2]",
    "no-text": b'{"meta": {"pile_set_name": "x"}}',
    "text-not-a-string": b'{"text": 3, "meta": {"pile_set_name": "x"}}',
    "not-utf8": b'{"text": "\xff", "meta": {"pile_set_name": "x"}}',
    "half-a-surrogate-pair": rb'{"text": "\ud800", "meta": {"pile_set_name": "x"}}',
    "too-deep": b"[" * 100_000,
    "no-domain": b'{"text": "a"}',
}


@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line_is_named_or_skipped(tmp_path, bpe, bad):
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD + b"\n" + bad + b"\n" + GOOD)
    with pytest.raises(GraddotError, match=r"a\.jsonl:2: "):
        tokenize(file, tmp_path / "out", bpe)
    meta = tokenize(file, tmp_path / "out", bpe, skip_bad_lines=True)
    assert meta["bad_lines"] == 1
    assert sum(d[s]["documents"] for d in meta["domains"] for s in ("train", "val")) == 2


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["truncated", "damaged"])
def test_broken_stream_names_the_file(tmp_path, bpe, ending, damage):
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
    assert meta["bad_lines"] == 1
    assert read == 1 if damage == "damaged" else 1 < read < 1500


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


@pytest.mark.parametrize(
    "option", [{"val_fraction": 1}, {"max_tokens": 0}, {"workers": 0}], ids=str
)
def test_option_out_of_range(tmp_path, pile, bpe, option):
    with pytest.raises(GraddotError, match=f"--{next(iter(option))}"):
        tokenize(pile, tmp_path / "out", bpe, **option)


def test_tokenizer_errors(tmp_path, pile, bpe, monkeypatch):
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(GraddotError, match="not a tokenizer.json"):
        tokenize(pile, tmp_path / "out", tmp_path / "broken.json")
    with pytest.raises(GraddotError, match="no such tokenizer file"):
        tokenize(pile, tmp_path / "out", tmp_path / "missing.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(GraddotError, match="'gpt2' could not be had.*local tokenizer.json"):
        tokenize(pile, tmp_path / "out", "gpt2")
    with pytest.raises(GraddotError, match="no token '</s>'"):
        tokenize(pile, tmp_path / "out", bpe, eot_token="</s>")


def test_eos_of_a_tokenizer_folder(tmp_path, pile):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    folder = tmp_path / "tok"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(GraddotError, match="--eot_token"):
        tokenize(pile, tmp_path / "out", folder / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenize(pile, tmp_path / "out", folder)["eot_token_id"] == 1


def test_hub_dataset_is_streamed(tmp_path, bpe, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(jsonl(range(40)))
    rows = datasets.Dataset.from_list([document(n) for n in range(40)])
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        return rows.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tokenize("some/pile", tmp_path / "hub", bpe, dataset_split="test")
    tokenize(tmp_path / "a.jsonl", tmp_path / "file", bpe)
    assert asked == [("some/pile", "test", True)]
    assert content(tmp_path / "hub") == content(tmp_path / "file")

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(GraddotError, match="some/pile.*no route to the hub"):
        tokenize("some/pile", tmp_path / "off", bpe)


def test_finished_foreign_and_unwritable_outputs(tmp_path, pile, bpe):
    tokenize(pile, tmp_path / "out", bpe)
    with pytest.raises(GraddotError, match="--overwrite"):
        tokenize(pile, tmp_path / "out", bpe)
    (tmp_path / "one.jsonl").write_bytes(GOOD)
    meta = tokenize(tmp_path / "one.jsonl", tmp_path / "out", bpe, overwrite=True)
    assert [d["name"] for d in meta["domains"]] == ["Pile-CC"]
    assert set(content(tmp_path / "out")) == {"pile-cc/train.bin", "pile-cc/val.bin"}
    with pytest.raises(GraddotError, match="holds other files"):
        tokenize(pile, pile, bpe)
    with pytest.raises(GraddotError, match="cannot be written"):
        tokenize(pile, tmp_path / "one.jsonl" / "out", bpe)


# Interrupted runs, in a process of their own

SCRIPT = """
import argparse
from graddot_lm import tokenization
tokenization.CHUNK_BYTES, tokenization.COMMIT_SECONDS = 20_000, 0
parser = argparse.ArgumentParser()
tokenization.add_arguments(parser)
tokenization.run(parser.parse_args())
"""


def start(source, out, bpe, *more) -> subprocess.Popen:
    words = [f"--input={source}", f"--output={out}", f"--tokenizer={bpe}", "--workers=2", *more]
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *words])


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Enough text for some hundred commits, over two files."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(range(2000))))
    (folder / "b.jsonl").write_bytes(jsonl(range(2000, 4000)))
    return folder


def wait_for(condition, process, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, process.poll()
        time.sleep(0.002)


def recorded_lines(out) -> int:
    try:
        state = json.loads((out / "progress.json").read_text())
    except FileNotFoundError:
        return 0
    return state["source"] * 2000 + state["line"]


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sigkill_loses_and_repeats_nothing(tmp_path, large, bpe):
    tokenize(large, tmp_path / "whole", bpe, val_fraction=0.2)
    out = tmp_path / "out"
    workers = []
    for stop in (1, 2300):
        process = start(large, out, bpe, "--val_fraction=0.2")
        wait_for(lambda stop=stop: recorded_lines(out) >= stop, process)
        workers += children_of(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert 2300 <= recorded_lines(out) < 4000
    for path in out.rglob("train.bin"):  # as if death had come between a write and its record
        with open(path, "ab") as file:
            file.write(b"\1\2\3")

    with pytest.raises(GraddotError) as refused:
        tokenize(large, out, bpe, val_fraction=0.3, seed=5)
    assert "seed: 0 before, 5 now; val_fraction: 0.2 before, 0.3 now" in str(refused.value)

    meta = tokenize(large, out, bpe, val_fraction=0.2)
    assert content(out) == content(tmp_path / "whole")
    assert meta == json.loads((tmp_path / "whole" / "meta.json").read_text())
    deadline = time.monotonic() + 5  # workers end with the process that started them
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) == 4
    alive = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert all("Z" in Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in alive)


def test_full_disk_keeps_what_was_recorded(tmp_path, large, bpe, monkeypatch):
    tokenize(large, tmp_path / "whole", bpe)
    out = tmp_path / "out"
    monkeypatch.setattr(tokenization, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(tokenization, "COMMIT_SECONDS", 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(GraddotError, match="cannot be written.*run the same command again"):
            tokenize(large, out, bpe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert recorded_lines(out) > 0
    tokenize(large, out, bpe)
    assert content(out) == content(tmp_path / "whole")


def test_lost_and_damaged_records_are_refused(tmp_path, pile, bpe, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenization.TokenWriter, "finish", raise_interrupt)
        tokenize(pile, out, bpe)
    (out / "github" / "train.bin").unlink()
    with pytest.raises(GraddotError, match="github/train.bin: shorter than recorded"):
        tokenize(pile, out, bpe)
    (out / "progress.json").write_text("{")
    with pytest.raises(GraddotError, match="progress.json: damaged"):
        tokenize(pile, out, bpe)
    tokenize(pile, out, bpe, overwrite=True)
    tokenize(pile, tmp_path / "whole", bpe)
    assert content(out) == content(tmp_path / "whole")


def raise_interrupt(*_):
    raise KeyboardInterrupt


# Training a tokenizer


def test_train_bpe_round_trips_any_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(range(50)))
    out = tmp_path / "new" / "tokenizer.json"
    args = options("bpe", input=tmp_path / "a.jsonl", output=out, vocab_size=300)
    assert tokenization.run_bpe(args) == 0
    tokenizer = Tokenizer.from_file(str(out))
    assert tokenizer.get_vocab_size() == 300 and tokenizer.token_to_id("<|endoftext|>") == 0
    for text in ("  two spaces\n\ttab", "漢字 🙂 \x00", "unseen Ωmega"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_train_bpe_errors(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n{}\n")
    with pytest.raises(GraddotError, match="at least 257"):
        train_bpe([str(tmp_path / "a.jsonl")], 256, tmp_path / "t.json")
    with pytest.raises(GraddotError, match=r"a\.jsonl:2: 'text' is missing"):
        train_bpe([str(tmp_path / "a.jsonl")], 300, tmp_path / "t.json")
