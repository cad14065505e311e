"""A run's directory: killed at every step of a save, created, resumed, and shared by processes."""

import errno
import os
import random
import signal
import time
from pathlib import Path

import pytest
from graddot_lm.errors import GraddotError
from graddot_lm.store import (
    METRICS,
    SCORES,
    PartWriter,
    open_rows,
    read_scores,
)
from graddot_lm.training.checkpoint import save_checkpoint
from graddot_lm.training.run_directory import RunDirectory
from graddot_lm.training.settings import check_resume, read_config
from stored_runs import (
    CONFIG,
    PROCESSES,
    N,
    check_after_kill,
    die_before_call,
    expect_steps,
    folder_of_parts,
    names,
    part_of,
    rows,
    start,
    state_at,
    train,
)

# Killed


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_may_die_before_any_change_to_the_disk(tmp_path, world):
    """For each such change in turn: a run dies before it, and the next one goes on to the end."""
    deaths = 0
    while True:
        path = tmp_path / f"run-{deaths}"
        process = start(train, path, 6, deaths, world)
        process.join()
        check_after_kill(path)
        if process.exitcode == 0:
            break
        assert process.exitcode == 9
        deaths += 1
        if deaths % 12 == 0:  # that the next one ends well is much the same for all of them
            process = start(train, path, 6, None, 3 - world)
            process.join()
            assert process.exitcode == 0
            expect_steps(path, 6)
    assert deaths > 30  # the counting does reach into the saves


def test_a_run_killed_at_random_moments_ends_with_every_row_once(tmp_path):
    path, steps, kills = tmp_path / "run", 150, 0
    chance = random.Random(3)
    deadline = time.monotonic() + 4
    while True:
        process = start(train, path, steps)
        process.join(chance.uniform(0.02, 0.25) if time.monotonic() < deadline else None)
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        check_after_kill(path)
    assert process.exitcode == 0
    assert kills >= 3
    expect_steps(path, steps)


def truncate(path: Path, step: int, die_at: int) -> None:
    die_before_call(die_at)
    PartWriter(path / "scores", SCORES).truncate_after(step)


def test_truncation_may_die_before_any_change_to_the_disk(tmp_path):
    deaths, exitcode = 0, None
    while exitcode != 0:
        path = tmp_path / str(deaths)
        writer = folder_of_parts(path, (0, 4), (5, 9), (10, 14))
        process = start(truncate, path, 6, deaths)
        process.join()
        exitcode = process.exitcode
        left = read_scores(path, ["step"])["step"].to_pylist()
        assert left in [[s for s in range(end) for _ in range(N)] for end in (7, 10, 15)]
        writer.truncate_after(6)
        expect_steps(path, 7)
        deaths += 1
    assert deaths > 4


# The run


def test_only_an_empty_folder_becomes_a_run(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(GraddotError, match="file: is a file"):
        RunDirectory.create(tmp_path / "file", CONFIG)
    with pytest.raises(GraddotError, match="cannot be written: Not a directory"):
        RunDirectory.create(tmp_path / "file" / "run", CONFIG)
    with pytest.raises(GraddotError, match="holds other files"):
        RunDirectory.create(tmp_path, CONFIG)
    RunDirectory.create(tmp_path / "a" / "run", CONFIG).close()
    with pytest.raises(GraddotError, match="holds a run; resume it"):
        RunDirectory.create(tmp_path / "a" / "run", CONFIG)
    for place, words in (("none/../a/run", "holds a run"), ("none/..", "holds other files")):
        with pytest.raises(GraddotError, match=words):  # also where "none" is not there yet
            RunDirectory.create(tmp_path / place, CONFIG)
    with pytest.raises(GraddotError, match="not a run's directory"):
        RunDirectory.resume(tmp_path / "b", CONFIG)


def test_a_folder_that_refuses_is_named(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(GraddotError, match=f"{tmp_path}/run.*Permission denied"):
        RunDirectory.create(tmp_path / "run", CONFIG)


def test_resuming_with_other_settings_is_refused_by_name(tmp_path):
    path = tmp_path / "run"
    RunDirectory.create(path, CONFIG).close()
    longer = {**CONFIG, "max_steps": 20}
    changed = {**longer, "lr": 0.2, "model": {"n_layer": 2}, "seed": 1}
    with pytest.raises(GraddotError) as caught:
        RunDirectory.resume(path, changed)
    for words in ("lr: 0.1 before, 0.2 now", "n_head: 2 before, not set now", "seed: not set"):
        assert words in str(caught.value)
    assert "max_steps" not in str(caught.value) and "n_layer" not in str(caught.value)
    assert read_config(path) == CONFIG
    check_resume(path, changed, may_differ=("max_steps", "lr", "model", "seed"))
    run, checkpoint = RunDirectory.resume(path, longer)
    assert checkpoint is None
    run.record(overhead=0.5)
    run.close()
    run, _ = RunDirectory.resume(path, longer)
    run.close()
    assert read_config(path) == {**longer, "measured": {"overhead": 0.5}}


def test_scores_are_not_dropped_because_checkpoints_were_lost(tmp_path):
    path = tmp_path / "run"
    train(path, 6)
    for file in (path / "checkpoints").rglob("tensors.safetensors"):
        file.unlink()
    with pytest.raises(GraddotError, match="checkpoints are lost"):
        RunDirectory.resume(path, CONFIG)
    expect_steps(path, 6)


@pytest.mark.parametrize("world", [1, 2])
def test_a_straddling_part_is_cut_when_an_older_checkpoint_is_resumed(tmp_path, world):
    path = tmp_path / "run"
    with RunDirectory.create(path, CONFIG, world=world) as run:
        for rank in range(1, world):
            with RunDirectory.join(path, rank, world) as other:
                for step in range(9):
                    other.scores.append(part_of(rows(step), rank, world), step)
        for step in range(9):
            run.scores.append(part_of(rows(step), 0, world), step)
            if step == 4:
                save_checkpoint(path / "checkpoints", step, state_at(step))
        run.save(8, state_at(8))
    os.truncate(path / "checkpoints" / "step-8" / "tensors.safetensors", 9)
    expect_steps(path, 9)
    run, checkpoint = RunDirectory.resume(path, CONFIG)
    run.close()
    assert checkpoint is not None and checkpoint.step == 4
    expect_steps(path, 5)
    who = [""] if world == 1 else ["-rank0of2", "-rank1of2"]
    assert names(path / "scores") == [f"part-00000000-00000004{rank}.parquet" for rank in who]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("gone", [[0], [1], [-1], [0, 1, 2, 3]])
def test_a_run_that_lost_scores_does_not_go_on(tmp_path, world, gone):
    """As from half a copy of its folder: the rows would have a gap that nobody is told of."""
    path = tmp_path / "run"
    train(path, 12, None, world)
    parts = sorted((path / "scores").iterdir())
    lost = {parts[i] for i in gone}
    for part in lost:
        part.unlink()
    before = names(path / "scores")
    first = min(int(part.name.split("-")[1]) for part in lost)
    with pytest.raises(GraddotError, match=f"the scores of step {first} are missing, .* step 12;"):
        RunDirectory.resume(path, CONFIG)
    assert names(path / "scores") == before


def test_a_run_without_scores_goes_on_without(tmp_path):
    config = {**CONFIG, "method": "Regular"}
    with RunDirectory.create(tmp_path / "run", config) as run:
        run.save(3, state_at(3))
    run, checkpoint = RunDirectory.resume(tmp_path / "run", config)
    run.close()
    assert checkpoint is not None and checkpoint.step == 3


def test_a_folder_of_scores_that_cannot_be_listed_is_not_an_empty_one(tmp_path, monkeypatch):
    folder_of_parts(tmp_path, (0, 4))

    def refuse(path="."):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(PermissionError):
        read_scores(tmp_path)


def test_a_part_is_passed_over_until_its_fellows_are_there(tmp_path):
    path = tmp_path / "run"
    with (
        RunDirectory.create(path, CONFIG, world=2) as run,
        RunDirectory.join(path, 1, 2) as other,
    ):
        for step in range(6):
            for rank, each in enumerate((run, other)):
                each.scores.append(part_of(rows(step), rank, 2), step)
            if step % 3 == 2:
                other.flush()
                expect_steps(path, step - 2)
                run.flush()
                expect_steps(path, step + 1)


def hold(path: Path, ready, done) -> None:
    run, _ = RunDirectory.resume(path, CONFIG)
    ready.set()
    done.wait()
    run.close()


def test_two_processes_do_not_write_one_run(tmp_path):
    path = tmp_path / "run"
    RunDirectory.create(path, CONFIG).close()
    ready, done = PROCESSES.Event(), PROCESSES.Event()
    process = start(hold, path, ready, done)
    assert ready.wait(30)
    with pytest.raises(GraddotError, match="another process is writing this run"):
        RunDirectory.resume(path, CONFIG)
    done.set()
    process.join()
    run, _ = RunDirectory.resume(path, CONFIG)
    run.close()


def test_rows_are_saved_at_the_end_of_a_with_block_unless_it_failed(tmp_path):
    with RunDirectory.create(tmp_path / "a", CONFIG) as run:
        run.scores.append(rows(0), 0)
    expect_steps(tmp_path / "a", 1)
    with pytest.raises(KeyError), RunDirectory.create(tmp_path / "b", CONFIG) as run:
        run.scores.append(rows(0), 0)
        raise KeyError
    expect_steps(tmp_path / "b", 0)


def test_metrics_of_every_column(tmp_path):
    row = {"train_loss": [3.5], "val_loss": [None], "lr": [0.1], "tokens_per_s": [100]}
    with RunDirectory.create(tmp_path / "run", CONFIG) as run:
        run.metrics.append(row, 0)
    table = open_rows(tmp_path / "run", "metrics").to_table()
    assert table.schema.equals(METRICS)
    assert table.to_pylist() == [{"step": 0, **{k: v[0] for k, v in row.items()}}]
