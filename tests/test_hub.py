"""Datasets and tokenizers by name: fetched and streamed by the hub's own libraries, from a hub on
this machine."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import zstandard
from graddot_lm.text import text_source
from hub_server import hub
from tokenize_checks import content, jsonl, small_bpe, tokenize

SCRIPT = """
from graddot_lm import cli
from graddot_lm.text import text_source, token_writer
text_source.CHUNK_BYTES, token_writer.COMMIT_SECONDS = 20_000, 0
raise SystemExit(cli.main())
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """What is served: a dataset like the Pile's copies on the hub, and a tokenizer."""
    root = tmp_path_factory.mktemp("served")
    data, bpe = root / "datasets" / "some" / "pile", root / "some" / "bpe"
    data.mkdir(parents=True)
    bpe.mkdir(parents=True)
    (data / "train-0.jsonl").write_bytes(jsonl(range(1500)))
    (data / "train-1.jsonl.zst").write_bytes(zstandard.compress(jsonl(range(1500, 2000))))
    (data / "test.jsonl").write_bytes(jsonl(range(50)))
    small_bpe(bpe)
    return root


@pytest.fixture
def start(files, tmp_path):
    """`start(dataset, tokenizer, output, ...)` runs `graddot tokenize` where that hub is the hub."""
    with hub(files) as address:
        environment = {
            **os.environ,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
        }

        def start_process(source, bpe, out, *more, endpoint=address) -> subprocess.Popen:
            options = ["--input", source, "--tokenizer", str(bpe), "--output", str(out), *more]
            command = [sys.executable, "-c", SCRIPT, "tokenize", *options]
            where = {**environment, "HF_ENDPOINT": endpoint}
            return subprocess.Popen(command, env=where, stderr=subprocess.PIPE, text=True)

        yield start_process


def test_a_killed_stream_goes_on(files, start, tmp_path):
    out = tmp_path / "out"
    process = start("some/pile", "some/bpe", out)
    deadline = time.monotonic() + 60
    lines = 0
    while lines < 500:
        assert time.monotonic() < deadline and process.poll() is None, process.poll()
        if (out / "progress.json").exists():
            lines = json.loads((out / "progress.json").read_text())["line"]
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "meta.json").exists()

    process = start("some/pile", "some/bpe", out)
    assert (process.communicate()[1], process.returncode) == ("", 0)
    (tmp_path / "all.jsonl").write_bytes(jsonl(range(2000)))
    meta = tokenize(tmp_path / "all.jsonl", tmp_path / "files", files / "some/bpe/tokenizer.json")
    assert content(out) == content(tmp_path / "files")
    by_name = json.loads((out / "meta.json").read_text())
    assert by_name["tokenizer"]["sha256"] == meta["tokenizer"]["sha256"]
    assert by_name["domains"] == meta["domains"]


def test_a_split_by_name(files, start, tmp_path):
    bpe = files / "some/bpe/tokenizer.json"
    process = start("some/pile", bpe, tmp_path / "out", "--dataset_split", "test")
    assert (process.communicate()[1], process.returncode) == ("", 0)
    tokenize(files / "datasets/some/pile/test.jsonl", tmp_path / "files", bpe)
    assert content(tmp_path / "out") == content(tmp_path / "files")


def test_wrong_names_and_a_damaged_dataset(files, start, tmp_path):
    bpe = files / "some/bpe"
    damaged = files / "datasets" / "some" / "damaged"
    damaged.mkdir()
    (damaged / "train-0.jsonl").write_bytes(jsonl(range(20)))
    (damaged / "train-1.jsonl").write_bytes(jsonl(range(20)) + b'{"text": 1\n')
    # One folder for all: a run that read nothing leaves nothing that would be in the next one's way.
    for source, tokenizer, more, message in [
        ("some/none", bpe, [], "some/none: no such file or folder here, and split 'train'.*exist"),
        ("some/pile", bpe, ["--dataset_split", "no"], "split 'no' of a dataset.*Bad split: no"),
        ("some/pile", "some/none", [], "'some/none' could not be had.*Repository Not Found"),
        ("some/damaged", bpe, [], "some/damaged: .* cannot be read beyond document 20 of split"),
    ]:
        process = start(source, tokenizer, tmp_path / "out", *more)
        errors = process.communicate()[1]
        assert process.returncode == 2, errors
        assert re.search(message, errors), errors


def test_a_hub_out_of_reach_is_asked_once(files, start, tmp_path):
    """The name may be that of a file, mistyped: whoever waits for minutes learns nothing more."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        process = start("some/pile", files / "some/bpe", tmp_path / "out", endpoint=address)
        errors = process.communicate()[1]
    assert process.returncode == 2 and "Retrying" not in errors, errors
    assert re.search("some/pile: no such file or folder here, and split 'train'.*refused", errors)


def test_a_cached_dataset_is_read_while_the_hub_does_not_answer(monkeypatch):
    def ask(url, timeout):
        assert timeout <= 10
        raise ConnectionError("no route to the hub")

    def load(name, split, streaming):
        assert datasets.config.HF_HUB_OFFLINE, "what is asked once more waits"
        return datasets.Dataset.from_dict({"text": ["a", "b"]}).to_iterable_dataset()

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", ask)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.load_dataset", load)
    (chunk,) = text_source.read_chunks(text_source.find_sources(["some/pile"]), 0, 1)
    assert chunk.records == [(2, {"text": "b"})] and not datasets.config.HF_HUB_OFFLINE
