"""A run's directory against kills at every step of a save, full disks, and resumes."""

import errno
import multiprocessing
import os
import random
import resource
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from graddot_lm.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from graddot_lm.errors import GraddotError
from graddot_lm.files import TEMPORARY
from graddot_lm.run_directory import RunDirectory
from graddot_lm.settings import check_resume, read_config
from graddot_lm.store import (
    METRICS,
    SCORES,
    PartWriter,
    open_rows,
    read_scores,
    scores_schema,
)

CONFIG = {"lr": 0.1, "model": {"n_layer": 2, "n_head": 2}, "max_steps": 9}
N = 3  # rows a step

PROCESSES = multiprocessing.get_context("fork")  # to import torch anew takes seconds


def rows(step: int) -> dict:
    """Score rows that follow from the step, so that what comes back can be told to be right."""
    ids = np.arange(N) + N * step
    return {
        "sample_id": ids,
        "domain": [f"domain {(step + i) % 4}" for i in range(N)],
        "offset": ids * 8,
        "n_tokens": np.full(N, 8),
        "loss": np.sin(ids),
        "dot": np.cos(ids),
        "lr": np.full(N, 0.1),
        "value": np.cos(ids) / 7,
    }


def expect_steps(run: Path, steps: int) -> None:
    """Exactly the rows of range(steps) are to be read, in order."""
    if not steps:
        with pytest.raises(GraddotError, match="nothing was saved"):
            read_scores(run)
        return
    table = read_scores(run)
    assert table["step"].to_pylist() == [step for step in range(steps) for _ in range(N)]
    for name in ("sample_id", "domain", "dot", "value"):
        wanted = [item for step in range(steps) for item in rows(step)[name]]
        assert table[name].to_pylist() == wanted


def fill(writer: PartWriter, first: int, last: int) -> None:
    """One part with the rows of steps first to last."""
    for step in range(first, last + 1):
        writer.append(rows(step), step)
    writer.flush()


def folder_of_parts(path: Path, *spans: tuple[int, int]) -> PartWriter:
    """The scores of a run that has nothing else."""
    (path / "scores").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    writer = PartWriter(path / "scores", SCORES)
    for first, last in spans:
        fill(writer, first, last)
    return writer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Killed


def state_at(step: int) -> dict:
    return {"model": {"w": torch.full((50,), float(step))}, "data": {"position": step * N}}


def part_of(columns: dict, rank: int, world: int) -> dict:
    """The rows that one of several processes has."""
    first, last = rank * N // world, (rank + 1) * N // world
    return {name: column[first:last] for name, column in columns.items()}


def train(path: Path, steps: int, die_at: int | None = None, world: int = 1) -> None:
    """Create or resume a run, save at every third step, and note in a file what was saved.

    Plays `world` processes, the last of which saves first.
    """
    if die_at is not None:
        die_before_call(die_at)
    if (path / "config.json").exists():
        run, checkpoint = RunDirectory.resume(path, CONFIG, world=world)
    else:
        run, checkpoint = RunDirectory.create(path, CONFIG, world=world), None
    others = [RunDirectory.join(path, rank, world) for rank in range(world - 1, 0, -1)]
    start = 0 if checkpoint is None else checkpoint.step + 1
    for step in range(start, steps):
        for rank, each in zip(range(world), [run, *others[::-1]], strict=True):
            each.scores.append(part_of(rows(step), rank, world), step)
        run.metrics.append({"train_loss": [1.0 / (step + 1)], "lr": [0.1]}, step)
        if step % 3:
            for each in [*others, run]:
                each.flush()
        if step % 3 == 2:
            run.save(step, state_at(step), keep=1)
            noted = os.open(path.with_suffix(".noted"), os.O_CREAT | os.O_WRONLY)
            os.pwrite(noted, f"{step:6d}".encode(), 0)
            os.close(noted)
    run.close()


def die_before_call(count: int) -> None:
    """End this process, as a kill would, before its count-th call that changes the disk."""

    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            count -= 1
            if count < 0:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))


def start(function, *args) -> multiprocessing.process.BaseProcess:
    process = PROCESSES.Process(target=function, args=args)
    process.start()
    return process


def check_after_kill(path: Path) -> None:
    """What a killed run left is whole, holds all that was saved, and can be resumed exactly."""
    if not (path / "config.json").exists():
        return
    try:
        seen = 1 + max(read_scores(path, ["step"])["step"].to_pylist())
    except GraddotError:
        seen = 0
    expect_steps(path, seen)  # before the resume: no gap, no duplicate at any instant
    latest = latest_checkpoint(path)
    saved = -1 if latest is None else load_checkpoint(latest).step
    noted = path.with_suffix(".noted")
    assert saved >= (int(noted.read_text()) if noted.exists() else -1)
    run, checkpoint = RunDirectory.resume(path, CONFIG)
    run.close()
    assert (checkpoint.step if checkpoint else -1) == saved
    if checkpoint is not None:
        assert torch.equal(checkpoint.state["model"]["w"], state_at(saved)["model"]["w"])
        assert checkpoint.state["data"] == state_at(saved)["data"]
        metrics = open_rows(path, "metrics").to_table()
        assert metrics["step"].to_pylist() == list(range(saved + 1))
    expect_steps(path, saved + 1)
    assert not list(path.rglob(TEMPORARY + "*"))


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


# Rows


@pytest.mark.parametrize("step", [-1, 0, 3, 4, 5, 7, 9, 20])
def test_truncation_drops_later_rows_and_writing_goes_on(tmp_path, step):
    writer = folder_of_parts(tmp_path, (0, 4), (5, 9))
    writer.append(rows(10), 10)
    writer.truncate_after(step)
    end = min(step, 9) + 1
    expect_steps(tmp_path, end)
    fill(writer, end, 12)
    expect_steps(tmp_path, 13)
    assert names(tmp_path / "scores")[-1] == f"part-{end:08d}-00000012.parquet"


def test_rows_keep_types_nulls_and_nan(tmp_path):
    writer = folder_of_parts(tmp_path)
    writer.append({"sample_id": [4], "dot": np.array([np.nan]), "step": [2]}, 2)
    reused = np.array([7])
    writer.append({"sample_id": reused, "dot": [1 / 3]}, 2)  # a second micro-batch of the step
    reused[0] = 0  # a caller's buffer may be filled anew
    writer.flush()
    table = read_scores(tmp_path)
    assert table.schema.types == SCORES.types
    assert table["sample_id"].to_pylist() == [4, 7]
    assert table["domain"].to_pylist() == [None, None]
    first, second = table["dot"].to_pylist()
    assert np.isnan(first) and second == 1 / 3
    assert read_scores(tmp_path, ["dot", "step"]).column_names == ["dot", "step"]


@pytest.mark.parametrize(
    "columns, step, error, words",
    [
        pytest.param({"dot": [1.0]}, 4, ValueError, "up to step 4", id="saved-step"),
        pytest.param({"dots": [1.0]}, 5, ValueError, "'dots'", id="unknown-column"),
        pytest.param({"norm": [1.0]}, 5, ValueError, r"'norm'.*scores_schema\(targets", id="norms"),
        pytest.param({"dot": [1.0], "lr": []}, 5, ValueError, "'lr': 0", id="lengths"),
        pytest.param({"sample_id": np.array([1.5])}, 5, TypeError, "float64", id="float-id"),
    ],
)
def test_wrong_rows_are_refused_and_change_nothing(tmp_path, columns, step, error, words):
    writer = folder_of_parts(tmp_path, (0, 4))
    with pytest.raises(error, match=words):
        writer.append(columns, step)
    fill(writer, 5, 5)
    expect_steps(tmp_path, 6)


def test_a_writer_makes_its_folder(tmp_path):
    folder = tmp_path / "run" / "scores"
    writer = PartWriter(str(folder), SCORES)
    fill(writer, 0, 2)
    expect_steps(tmp_path / "run", 3)
    with pytest.raises(GraddotError, match="part-.*cannot be written: "):
        PartWriter(folder / "part-00000000-00000002.parquet", SCORES)


def test_several_targets_have_columns_of_their_own(tmp_path):
    assert scores_schema() is SCORES
    with RunDirectory.create(tmp_path / "run", CONFIG, targets=("code", "math")) as run:
        run.scores.append({"dot_code": [1.0], "value_math": [2.0]}, 0)
    table = read_scores(tmp_path / "run")
    assert table.column_names[-4:] == ["dot_code", "value_code", "dot_math", "value_math"]
    assert table["value_math"].to_pylist() == [2.0]


@pytest.mark.parametrize("targets", [(), ("a", "b")], ids=["single", "several"])
def test_norms_have_columns_of_their_own(tmp_path, targets):
    config = {**CONFIG, "norms": True}
    cosine = "cosine_b" if targets else "cosine"
    with RunDirectory.create(tmp_path / "run", config, targets=targets, world=2) as run:
        run.scores.append({"norm": [1.0], cosine: [0.5]}, 0)
        with RunDirectory.join(tmp_path / "run", 1, 2, targets) as other:
            other.scores.append({"norm": [2.0]}, 0)
    table = read_scores(tmp_path / "run", ["norm", cosine])
    assert table["norm"].to_pylist() == [1, 2] and table[cosine].to_pylist() == [0.5, None]


def test_other_columns_than_the_rows_that_stay_have_are_refused(tmp_path):
    """As when a run of the Trainer is resumed with norms, or without."""
    folder_of_parts(tmp_path, (0, 4), (5, 9))
    for last in (9, 6):
        with pytest.raises(GraddotError, match="'applied'], and now come others, .*'cosine']"):
            PartWriter(tmp_path / "scores", scores_schema(norms=True)).truncate_after(last)
        expect_steps(tmp_path, 10)
    PartWriter(tmp_path / "scores", scores_schema(norms=True)).truncate_after(-1)
    expect_steps(tmp_path, 0)


def test_a_damaged_part_is_named(tmp_path):
    folder_of_parts(tmp_path, (0, 4), (5, 9))
    part = tmp_path / "scores" / "part-00000005-00000009.parquet"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(GraddotError, match="cannot be read.*part-00000005"):
        read_scores(tmp_path)


def test_a_flipped_bit_is_noticed(tmp_path):
    writer = folder_of_parts(tmp_path, (0, 4))
    part = tmp_path / "scores" / "part-00000000-00000004.parquet"
    data = bytearray(part.read_bytes())
    at = data.index(np.cos(np.arange(5 * N)).tobytes()[:8])  # a page of dots, not compressed
    data[at] ^= 1
    part.write_bytes(data)
    with pytest.raises(GraddotError, match="cannot be read.*[Cc][Rr][Cc]"):
        read_scores(tmp_path)
    writer.truncate_after(4)  # looks at what the parts are, not at all they hold


@pytest.mark.parametrize("kind", ["scores", "metrics"])
@pytest.mark.parametrize("damage", ["cut", "empty", "folder"])
def test_a_run_with_a_damaged_part_does_not_go_on(tmp_path, kind, damage):
    path = tmp_path / "run"
    train(path, 9)
    parts = sorted((path / kind).glob("part-*"))
    data = parts[1].read_bytes()
    parts[1].unlink()
    if damage == "folder":
        parts[1].mkdir()
    else:
        parts[1].write_bytes(data[: len(data) // 2 if damage == "cut" else 0])
    with pytest.raises(GraddotError, match=f"{parts[1].name}: cannot be read"):
        RunDirectory.resume(path, CONFIG)
    if damage == "folder":
        parts[1].rmdir()
    parts[1].write_bytes(data)
    RunDirectory.resume(path, CONFIG)[0].close()
    expect_steps(path, 9)


# No room


@contextmanager
def files_up_to(size: int):
    """The system refuses to let any file grow beyond `size` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_that_do_not_fit_stay_until_there_is_room(tmp_path):
    writer = folder_of_parts(tmp_path, (0, 4))
    writer.append(rows(5), 5)
    with files_up_to(1000), pytest.raises(GraddotError, match="part-00000005.*File too large"):
        writer.flush()
    assert names(tmp_path / "scores") == ["part-00000000-00000004.parquet"]
    expect_steps(tmp_path, 5)
    fill(writer, 6, 6)
    expect_steps(tmp_path, 7)


def test_a_full_disk_that_shows_at_the_sync_is_named(tmp_path, monkeypatch):
    writer = folder_of_parts(tmp_path, (0, 4))

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer.append(rows(5), 5)
    with monkeypatch.context() as patch, pytest.raises(GraddotError) as caught:
        patch.setattr(os, "fsync", full)
        writer.flush()
    assert "part-00000005" in str(caught.value) and "No space left" in str(caught.value)
    assert len(names(tmp_path / "scores")) == 1
    writer.flush()
    expect_steps(tmp_path, 6)


def test_a_checkpoint_that_does_not_fit_leaves_the_older_ones(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state_at(step))
    big = {"model": {"w": torch.zeros(100_000)}}
    with files_up_to(10_000), pytest.raises(GraddotError, match="step-3: cannot be written.*large"):
        save_checkpoint(tmp_path, 3, big)
    assert names(tmp_path) == ["step-1", "step-2"]
    save_checkpoint(tmp_path, 3, big)
    assert names(tmp_path) == ["step-2", "step-3"]


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
