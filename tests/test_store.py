"""Rows of scores in parts: written, read again, refused, damaged, and kept while a disk is full."""

import errno
import os
import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from graddot_lm.errors import GraddotError
from graddot_lm.store import (
    SCORES,
    PartWriter,
    read_scores,
    scores_schema,
)
from graddot_lm.training.checkpoint import save_checkpoint
from graddot_lm.training.run_directory import RunDirectory
from stored_runs import CONFIG, N, expect_steps, fill, folder_of_parts, names, rows, state_at, train

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
