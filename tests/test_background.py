"""Rows that a thread saves: nothing lost, reordered or waited for, whatever goes wrong."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from brute_force import tiny_gpt2, token_batch
from graddot_lm import GraddotError, GradDotProdEngine, fuse_head
from graddot_lm.background import BackgroundWriter, WriterThread
from graddot_lm.batches import Rows, read_batch
from graddot_lm.store import SCORES, PartWriter, read_scores
from graddot_lm.training.run_directory import RunDirectory
from stored_runs import CONFIG, check_after_kill, die_before_call, expect_steps, rows, start
from stored_runs import state_at as state
from waits import VALUES, Waits


class Ignore:
    def append(self, rows, step):
        pass


def step(engine, optimizer, number, *, scaler=None, **forward):
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    x, y = token_batch(3, 9, seed=number, ragged=True)
    engine.attach_train_batch(x, y, number, torch.arange(3) + 3 * number)
    xx, yy = engine.prepare_forward_input(x, y)
    scaler.scale(engine.model(xx, labels=yy, **forward).loss).backward()
    engine.prepare_gradients()
    scaler.step(optimizer)
    scaler.update()
    scores = engine.aggregate_and_log(gradient_scale=torch.tensor(0.5))
    optimizer.zero_grad()
    return scores


# A head that is fused looks at two numbers, on CPUs alone: whether labels are tokens, and whether the
# loss was scaled. A GPU's branches and ops are seen in tests/interpreter/test_gpu_route.py.
CASES = {
    "tied": ({}, {}, 0),
    "untied": ({"tied": False}, {"per_parameter": True}, 0),
    "fused": ({"fused": True}, {"label_shift": 1}, 2),
    "given": ({"given": True}, {}, 0),
    "tokens": ({"given": True}, {"per_token": True}, 0),
    "scaler": ({"scaler": True}, {}, 0),
    "items": ({"forward": {"num_items_in_batch": torch.tensor(20)}}, {}, 0),
    "targets": ({"targets": True}, {}, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_no_step_but_the_first_waits(case):
    setting, options, expected = CASES[case]
    model, val = tiny_gpt2(tied=setting.get("tied", True)), token_batch(2, 9, seed=99)
    if setting.get("fused"):
        fuse_head(model)
    # fused: GradScaler itself looks at its result for any other
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if setting.get("scaler") else None
    given, targets = setting.get("given"), setting.get("targets")
    data = None if given else {"a": val, "b": val} if targets else val
    engine = GradDotProdEngine(model, data, store=Ignore(), **options)
    if given:
        engine.set_directions(engine.compute_directions([val]))
    engine.attach(optimizer)
    found = []
    for number in range(3):
        with Waits() as waits:
            step(engine, optimizer, number, scaler=scaler, **setting.get("forward", {}))
        found.append(sum(waits.waiting(VALUES).values()))
        backward = [name for name in waits.seen if name.endswith("_backward")]
        assert backward, "the backward is not seen"
    assert found[0] > expected, "the first step's checks are not seen"
    assert found[1:] == [expected, expected], waits.waiting(VALUES)


def test_val_rows_are_moved_to_the_training_rows_once():
    """A copy to a device waits for it."""
    ids, labels = token_batch(2, 9, seed=1)
    val = read_batch({"input_ids": ids, "labels": labels}, "val")
    train = Rows({"input_ids": ids.to("meta")}, labels.to("meta"))
    moved = val.beside(train)
    assert moved.inputs["input_ids"].is_meta and moved.labels.is_meta and moved.labels_inside
    again = moved.beside(train)
    assert again.labels is moved.labels and again.inputs["input_ids"] is moved.inputs["input_ids"]


def test_rows_are_those_of_a_writer_that_waits(tmp_path):
    """Every bit, though the loop's buffers are used anew before the thread gets at them."""
    paths = [tmp_path / name for name in ("thread", "plain")]
    for path in paths:
        (path / "scores").mkdir(parents=True)
        (path / "config.json").write_text("{}")
    hold, thread = threading.Event(), WriterThread()
    thread.call(hold.wait, 60)
    plain = [PartWriter(path / "scores", SCORES) for path in paths]
    for writer in (BackgroundWriter(plain[0], thread), plain[1]):
        model, val = tiny_gpt2(), token_batch(2, 9, seed=99)
        optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
        engine = GradDotProdEngine(model, val, store=writer)
        engine.attach(optimizer)
        loss = np.zeros(3, dtype=np.float32)
        for number in range(4):
            x, y = token_batch(3, 9, seed=number, ragged=True)
            ids = torch.arange(3) + number
            engine.attach_train_batch(x, y, number, ids)
            xx, yy = engine.prepare_forward_input(x, y)
            model(xx, labels=yy).loss.backward()
            engine.prepare_gradients()
            optimizer.step()
            optimizer.param_groups[0]["lr"].mul_(0.5)  # as a scheduler changes it
            loss[:] = number
            engine.aggregate_and_log({"loss": loss, "domain": ["a", "b", "c"]})
            ids.zero_()
            loss.fill(-1)
            optimizer.zero_grad()
        hold.set()
        writer.flush()
    tables = [read_scores(path) for path in paths]
    assert tables[0].equals(tables[1]) and tables[0].num_rows == 12
    assert tables[0]["lr"].to_pylist()[::3] == pytest.approx([0.1, 0.05, 0.025, 0.0125])
    assert tables[0]["loss"].to_pylist()[::3] == [0, 1, 2, 3]


def test_a_full_queue_is_waited_for():
    hold, thread, done = threading.Event(), WriterThread(limit=3), []
    for i in range(3):
        thread.call(lambda i=i: hold.wait(60) and done.append(i))
    threading.Timer(0.2, hold.set).start()
    thread.call(lambda: done.append(3))
    assert hold.is_set(), "went on with more calls than the limit"
    thread.wait()
    assert done == [0, 1, 2, 3]


def failing(folder, call):
    """A writer, whose thread has failed once when this returns, in `call(writer)`."""
    (folder / "scores").mkdir()
    (folder / "config.json").write_text("{}")
    writer = BackgroundWriter(PartWriter(folder / "scores", SCORES))
    writer.append(rows(0), 0)
    call(writer)
    deadline = time.monotonic() + 60
    while not writer._thread.failed:
        assert time.monotonic() < deadline
    return writer


def test_what_cannot_be_saved_is_raised_by_the_next_step_and_kept(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        writer = failing(tmp_path, lambda writer: writer.flush(wait=False))
    assert not any((tmp_path / "scores").iterdir())
    with pytest.raises(GraddotError, match="part-00000000-00000000.*No space left"):
        writer.append(rows(1), 1)
    writer.append(rows(1), 1)  # what raised had not taken them
    writer.flush()
    expect_steps(tmp_path, 2)


def test_nothing_is_saved_behind_rows_that_were_refused(tmp_path):
    writer = failing(tmp_path, lambda writer: writer.append({"dots": [1.0]}, 1))
    with pytest.raises(ValueError, match="'dots'"):
        writer.append(rows(2), 2)
    writer.append(rows(3), 3)
    for _ in range(2):
        with pytest.raises(ValueError, match="'dots'"):
            writer.append(rows(4), 4)
            writer.flush()
    writer.flush()
    expect_steps(tmp_path, 1)


def test_a_folder_that_is_gone_is_named_and_no_checkpoint_counts_on_it(tmp_path):
    run = RunDirectory.create(tmp_path / "run", CONFIG)
    run.scores.append(rows(0), 0)
    (tmp_path / "run" / "scores").rmdir()
    with pytest.raises(GraddotError, match="part-00000000-00000000.*cannot be written"):
        run.save(0, state(0))
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
    run.close()


def test_closing_waits_for_what_is_being_saved(tmp_path):
    """Another process may take the run over as soon as it is closed."""
    run = RunDirectory.create(tmp_path / "run", CONFIG)
    hold = threading.Event()
    run._thread.call(hold.wait, 60)
    run.scores.append(rows(0), 0)
    run.flush(wait=False)
    expect_steps(tmp_path / "run", 0)
    threading.Timer(0.2, hold.set).start()
    run.close()
    expect_steps(tmp_path / "run", 1)


def train(path, steps, die_at):
    """Rows saved without waiting at every step, and a checkpoint at every third."""
    die_before_call(die_at)
    run = RunDirectory.create(path, CONFIG)
    for number in range(steps):
        run.scores.append(rows(number), number)
        run.metrics.append({"train_loss": [1.0 / (number + 1)], "lr": [0.1]}, number)
        run.flush(wait=False)
        if number % 3 == 2:
            run.save(number, state(number), keep=1)
    run.close()


def test_a_run_may_die_before_any_change_to_the_disk(tmp_path):
    deaths, exitcode = 0, None
    while exitcode != 0:
        path = tmp_path / f"run-{deaths}"
        process = start(train, path, 6, deaths)
        process.join(60)
        exitcode = process.exitcode
        check_after_kill(path)
        assert exitcode in (0, 9)
        deaths += 3
    assert deaths > 60


SCRIPT = """
import sys, time, signal
import numpy as np
from graddot_lm.background import BackgroundWriter, WriterThread
from graddot_lm.store import SCORES, PartWriter
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs behind
thread = WriterThread()
writer = BackgroundWriter(PartWriter(Path(sys.argv[1]) / "scores", SCORES), thread)
for step in range(4):
    thread.call(time.sleep, 0.1)
    writer.append({"sample_id": [step]}, step)
    writer.flush(wait=False)
how = sys.argv[2]
if how == "error":
    raise RuntimeError("the loop failed")
if how == "interrupt":
    print("ready", flush=True)
    for _ in range(1200):  # where the interpreter sees the signal, which may come before a sleep begins
        time.sleep(0.05)
"""


@pytest.mark.parametrize("how", ["error", "interrupt"])
def test_the_interpreter_ends_when_what_was_due_is_saved(tmp_path, how):
    (tmp_path / "scores").mkdir()
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if how == "interrupt":
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    said = {"error": "the loop failed", "interrupt": "KeyboardInterrupt"}[how]
    assert said in error and process.returncode != 0, error
    parts = sorted(path.name for path in (tmp_path / "scores").iterdir())
    assert parts == [f"part-{step:08d}-{step:08d}.parquet" for step in range(4)]
