"""Runs that write rows and checkpoints, for tests: rows by step, kills, and what these leave."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from graddot_lm.errors import GraddotError
from graddot_lm.files import TEMPORARY
from graddot_lm.store import (
    SCORES,
    PartWriter,
    open_rows,
    read_scores,
)
from graddot_lm.training.checkpoint import latest_checkpoint, load_checkpoint
from graddot_lm.training.run_directory import RunDirectory

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
