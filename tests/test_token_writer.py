"""Output folders of `graddot tokenize`: refused, interrupted at any instant, gone on with."""

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from graddot_lm.errors import GraddotError
from graddot_lm.text import text_source, token_writer, tokenization
from tokenize_checks import GOOD, content, jsonl, small_bpe, small_pile, tokenize


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    return small_bpe(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(autouse=True)
def sigint():
    """A run that was interrupted leaves SIGINT ignored, for its process is about to end."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def pile(tmp_path) -> Path:
    return small_pile(tmp_path / "pile")


def test_finished_foreign_and_unwritable_outputs(tmp_path, pile, bpe):
    tokenize(pile, tmp_path / "out", bpe)
    with pytest.raises(GraddotError, match="--overwrite"):
        tokenize(pile, tmp_path / "out", bpe)
    (tmp_path / "one.jsonl").write_bytes(GOOD)
    meta = tokenize(tmp_path / "one.jsonl", tmp_path / "out", bpe, overwrite=True)
    assert [d["name"] for d in meta["domains"]] == ["Pile-CC"]
    assert set(content(tmp_path / "out")) == {"pile-cc/train.bin", "pile-cc/val.bin"}
    with pytest.raises(GraddotError, match="holds other files"):
        tokenize(tmp_path / "one.jsonl", pile, bpe)
    with pytest.raises(GraddotError, match="cannot be written"):
        tokenize(pile, tmp_path / "one.jsonl" / "out", bpe)


@pytest.mark.parametrize("meta", ['{"stoi": {}}', "3", "not JSON"])
def test_the_token_files_of_another_program_are_not_replaced(tmp_path, pile, bpe, meta):
    (tmp_path / "data" / "shakespeare").mkdir(parents=True)
    (tmp_path / "data" / "shakespeare" / "train.bin").write_bytes(b"tokens")
    (tmp_path / "data" / "meta.json").write_text(meta)
    for overwrite in ({}, {"overwrite": True}):
        with pytest.raises(GraddotError, match="data: holds other files; choose a new or empty"):
            tokenize(pile, tmp_path / "data", bpe, **overwrite)
    assert content(tmp_path / "data") == {"shakespeare/train.bin": b"tokens"}
    assert (tmp_path / "data" / "meta.json").read_text() == meta


def test_an_output_in_an_input_or_around_it_is_refused(tmp_path, pile, bpe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for output in ("pile", "pile/sub", "pile/new/../tokens"):
        with pytest.raises(GraddotError, match=f"--output {output}: is the input pile, or lies in"):
            tokenize("pile", output, bpe)
    with pytest.raises(GraddotError, match="is the input some/set, or lies in it"):
        tokenize("some/set", "some/set/tokens", bpe)  # on the hub now, a folder the next time
    assert not (tmp_path / "some").exists() and len(list(pile.rglob("*"))) == 5

    tokenize("pile/a.jsonl", "pile/tokens", bpe)  # a file, in which nothing can lie
    before = content(pile)
    (pile / "tokens" / "more.jsonl").write_bytes(GOOD)
    for source in ("pile", "pile/tokens/more.jsonl"):
        with pytest.raises(GraddotError, match=f"the input {source}[, ].*lies in it"):
            tokenize(source, "pile/tokens", bpe, overwrite=True)
    assert content(pile) == before and (pile / "tokens" / "meta.json").exists()


# Interrupted runs, in a process of their own

SCRIPT = """
import argparse, signal
from graddot_lm.text import text_source, token_writer, tokenization
text_source.CHUNK_BYTES, token_writer.COMMIT_SECONDS = 20_000, 0
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs behind
parser = argparse.ArgumentParser()
tokenization.add_arguments(parser)
tokenization.run(parser.parse_args())
"""


def start(source, out, bpe, *more, **how) -> subprocess.Popen:
    words = [f"--input={source}", f"--output={out}", f"--tokenizer={bpe}", "--workers=2", *more]
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *words], **how)


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


def test_two_processes_do_not_write_one_folder(tmp_path, large, bpe):
    """Each would append its tokens to the other's, and the next run would take that for its own."""
    tokenize(large, tmp_path / "whole", bpe)
    out = tmp_path / "out"
    process = start(large, out, bpe)
    wait_for(lambda: recorded_lines(out) > 0, process)
    os.kill(process.pid, signal.SIGSTOP)
    for more in ({}, {"overwrite": True}):
        with pytest.raises(GraddotError, match="out: another process is writing token data"):
            tokenize(large, out, bpe, **more)
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(30) == 0
    assert content(out) == content(tmp_path / "whole")


def test_text_that_changed_meanwhile_is_named_not_listed(tmp_path, bpe, monkeypatch):
    pile, out = tmp_path / "pile", tmp_path / "out"
    pile.mkdir()
    for n in range(200):
        (pile / f"{n:03}.jsonl").write_bytes(jsonl([n]))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(token_writer.TokenWriter, "finish", raise_interrupt)
        tokenize(pile, out, bpe)
    (pile / "007.jsonl").write_bytes(GOOD)
    with pytest.raises(GraddotError) as refused:
        tokenize(pile, out, bpe)
    assert f"(--input: {pile}/007.jsonl changed)" in str(refused.value)
    for n in range(100):
        (pile / f"{n:03}.jsonl").unlink()
    with pytest.raises(GraddotError) as refused:
        tokenize(pile, out, bpe)
    assert "002.jsonl and 97 more changed)" in str(refused.value)
    given = [str(path) for path in sorted(pile.iterdir(), reverse=True)]
    tokenize(pile, tmp_path / "other", bpe)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(token_writer.TokenWriter, "finish", raise_interrupt)
        tokenize(pile, tmp_path / "other", bpe, overwrite=True)
    with pytest.raises(GraddotError, match="--input: its order changed"):
        tokenize(given, tmp_path / "other", bpe)


@pytest.mark.parametrize("keeps", ["its start", "its time"])
def test_other_text_of_the_same_size_is_not_read_on(tmp_path, pile, bpe, monkeypatch, keeps):
    file, out = pile / "a.jsonl", tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(token_writer.TokenWriter, "finish", raise_interrupt)
        tokenize(pile, out, bpe)
    before, text = file.stat(), file.read_bytes()
    file.write_bytes(text[:-1] + b" " if keeps == "its start" else text[::-1])
    if keeps == "its time":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    with pytest.raises(GraddotError, match=f"--input: {file} changed"):
        tokenize(pile, out, bpe)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_is_quiet_and_the_run_goes_on(tmp_path, large, bpe):
    tokenize(large, tmp_path / "whole", bpe)
    out = tmp_path / "out"
    how = {"start_new_session": True, "stderr": subprocess.PIPE, "text": True}
    # As soon as there are workers, then far into the text.
    for more, options, hint in [(0, ["--overwrite"], " without --overwrite"), (1000, [], "")]:
        lines = recorded_lines(out) + more
        process = start(large, out, bpe, *options, **how)
        wait_for((out / "progress.json").exists, process)
        wait_for(lambda lines=lines: recorded_lines(out) >= lines, process)
        wait_for(lambda pid=process.pid: children_of(pid), process)
        for _ in range(3):  # to the workers too, as a terminal does, and impatiently
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.05)
        said = process.communicate(timeout=30)[1]
        goes_on = f"the same command{hint} goes on where it was"
        assert said == f"graddot tokenize: interrupted; {goes_on}\n"
        assert process.returncode == 130
        with pytest.raises(ProcessLookupError):  # no process of the group is left
            os.killpg(process.pid, 0)
    assert 1000 <= recorded_lines(out) < 4000
    tokenize(large, out, bpe)
    assert content(out) == content(tmp_path / "whole")


def test_ctrl_c_promises_nothing_that_does_not_hold(tmp_path, pile, bpe, monkeypatch, capsys):
    for name in ("load_tokenizer", "_report"):  # nothing begun, nothing left to do
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(tokenization, name, raise_interrupt)
            tokenize(pile, tmp_path / "out", bpe)
        assert ended.value.code == 130
        assert capsys.readouterr().err == "graddot tokenize: interrupted\n"


def test_full_disk_keeps_what_was_recorded(tmp_path, large, bpe, monkeypatch):
    tokenize(large, tmp_path / "whole", bpe)
    out = tmp_path / "out"
    monkeypatch.setattr(text_source, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(token_writer, "COMMIT_SECONDS", 0)
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
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(token_writer.TokenWriter, "finish", raise_interrupt)
        tokenize(pile, out, bpe)
    (out / "github" / "train.bin").unlink()
    with pytest.raises(GraddotError, match="github/train.bin: shorter than recorded"):
        tokenize(pile, out, bpe)
    state = json.loads((out / "progress.json").read_text())
    domain = {**state["domains"][0], "train": 7}
    sources = [{**state["settings"]["sources"][0], "split": [1]}]
    shapes = [state | {"domains": [domain]}, state | {"bad_lines": []}]
    shapes += [state | {"settings": state["settings"] | {"sources": sources}}]
    for damaged in ("{", "[]", *map(json.dumps, shapes)):
        (out / "progress.json").write_text(damaged)
        with pytest.raises(GraddotError, match="progress.json: damaged"):
            tokenize(pile, out, bpe)
    tokenize(pile, out, bpe, overwrite=True)
    tokenize(pile, tmp_path / "whole", bpe)
    assert content(out) == content(tmp_path / "whole")


def test_a_record_of_an_older_version(tmp_path, pile, bpe, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(token_writer.TokenWriter, "finish", raise_interrupt)
        tokenize(pile, out, bpe)
    state = json.loads((out / "progress.json").read_text())
    del state["damaged_files"]
    for source in state["settings"]["sources"]:  # nor was it what a replaced file is told by
        del source["modified"], source["start"]
    (out / "progress.json").write_text(json.dumps(state))
    assert tokenize(pile, out, bpe)["damaged_files"] == []


def raise_interrupt(*_):
    raise KeyboardInterrupt
