"""A run's directory: its settings, rows of scores and metrics, and checkpoints.

    config.json                              settings, versions, commit, parameters covered
    scores/part-<first>-<last step>.parquet  one row a training sample a step
    metrics/part-<first>-<last step>.parquet one row a step
    scores/part-<first>-<last step>-rank<r>of<w>.parquet  of several processes, each its own rows
    checkpoints/step-<k>/                    the state after step k

Whatever a reader sees is whole. Rows are saved before the checkpoint that follows them, and a
resumed run first drops the rows beyond its checkpoint: so a process may be killed at any instant,
and the rows of the resumed run have neither gap nor duplicate. Of several processes the first
alone changes anything but its own parts; readers pass over a part until its fellows are there.
"""

import fcntl
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from graddot_lm.background import BackgroundWriter, WriterThread
from graddot_lm.errors import GraddotError
from graddot_lm.files import TEMPORARY, lock, reached, remove_temporary, writing
from graddot_lm.store import KINDS, METRICS, PartWriter, first_missing, scores_schema
from graddot_lm.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from graddot_lm.training.settings import check_resume, read_config, write_config


@final
class RunDirectory:
    """A run that this process writes. Made by `create` or `resume`, and in the further processes
    of a run that has several, once the first has made it, by `join`; no other writes it then.

    `scores` and `metrics` take the rows, which one thread saves; what goes wrong there is raised by
    `check`, `flush` and `save`, which waits for the thread and then saves a checkpoint. Leaving a
    `with` block without an exception saves the rows that are left.
    """

    # Lies among the checkpoints until there is one. A run that lost its checkpoints is told by its
    # absence from one that was killed before its first, and only the latter may drop all its rows.
    _NONE_YET = Path("checkpoints/none-yet")

    def __init__(
        self,
        path: Path,
        targets: Sequence[str],
        rank: int = 0,
        world: int = 1,
        norms: bool = False,
    ) -> None:
        self.path = path
        with writing(path):
            folders = [path / name for name in (*KINDS, "checkpoints")]
            if rank == 0:
                for folder in folders:
                    folder.mkdir(parents=True, exist_ok=True)
            # Each process holds the byte of its number, the first one all until the run is
            # made: so it is not made while any process of an earlier start is still there.
            busy = f"{path}: another process is writing this run"
            self._lock = lock(path / "lock", busy, 1 if rank else 0, rank)
            if rank == 0:
                for folder in (path, *folders):
                    remove_temporary(folder)
        self._thread = WriterThread()
        scores = PartWriter(path / "scores", scores_schema(targets, norms), rank, world)
        self.scores = BackgroundWriter(scores, self._thread)
        self.metrics = BackgroundWriter(PartWriter(path / "metrics", METRICS), self._thread)

    @classmethod
    def create(
        cls, path: str | Path, config: Mapping, targets: Sequence[str] = (), world: int = 1
    ) -> "RunDirectory":
        """Begin a run of `world` processes in a new or empty folder; `config` of JSON types, with
        "norms": true if the scores have these columns.

        Raises GraddotError if a run or anything else is there, or it cannot be written.
        """
        path = Path(path)
        # Where ".." leads, also out of a folder that is not there yet.
        place = reached(path.resolve())
        if place.exists() and not place.is_dir():
            raise GraddotError(f"{path}: is a file; a run needs a folder")
        if (place / "config.json").exists():
            raise GraddotError(f"{path}: holds a run; resume it, or choose another folder")
        with writing(path):
            if any(_foreign(file) for file in place.rglob("*")):
                raise GraddotError(f"{path}: holds other files; choose a new or empty folder")
        run = cls(path, targets, 0, world, bool(config.get("norms")))
        with writing(path):
            (path / cls._NONE_YET).touch()
        write_config(path, config)  # last: it is what makes the folder a run
        run._let_others_join()
        return run

    @classmethod
    def join(
        cls, path: str | Path, rank: int, world: int, targets: Sequence[str] = ()
    ) -> "RunDirectory":
        """Write the rows of process `rank`, at least 1, to a run that process 0 has made.

        Only `scores`, `flush` and `close` are for this process. Raises GraddotError if there is no
        run, as where process 0 is on a machine with other files, or `rank` is taken.
        """
        norms = bool(read_config(path).get("norms"))
        return cls(Path(path), targets, rank, world, norms)

    def _let_others_join(self) -> None:
        fcntl.lockf(self._lock, fcntl.LOCK_UN, 0, 1)

    @classmethod
    def resume(
        cls,
        path: str | Path,
        config: Mapping,
        may_differ: Sequence[str] = ("max_steps",),
        targets: Sequence[str] = (),
        world: int = 1,
    ) -> tuple["RunDirectory", Checkpoint | None]:
        """Go on with a run from its latest checkpoint; None if it was killed before its first.

        Drops the rows of later steps; `world` need not be that of before. Raises GraddotError, and
        drops nothing, if settings differ (see `check_resume`), the checkpoints are lost or damaged,
        scores of steps before are lost, or another process has the run.
        """
        path = Path(path)
        check_resume(path, config, may_differ)
        run = cls(path, targets, 0, world, bool(config.get("norms")))
        latest = latest_checkpoint(path)
        if latest is None and not (path / cls._NONE_YET).exists():
            raise GraddotError(
                f"{path}: its checkpoints are lost or damaged, so it cannot go on; its scores are "
                "as they were"
            )
        checkpoint = None if latest is None else load_checkpoint(latest)
        if checkpoint is not None and config.get("method") != "Regular":
            _check_whole(path / "scores", checkpoint.step)
        for rows in (run.scores, run.metrics):
            rows.truncate_after(-1 if checkpoint is None else checkpoint.step)
        measured = read_config(path).get("measured")
        write_config(path, {**config, "measured": measured} if measured else config)
        run._let_others_join()
        return run, checkpoint

    @property
    def failed(self) -> bool:
        """Whether rows could not be saved, as `check` would raise."""
        return self._thread.failed

    def check(self) -> None:
        """Raise what went wrong as rows were appended or saved. Waits for nothing."""
        self._thread.check()

    def flush(self, wait: bool = True) -> None:
        """Save the rows so far; if not `wait`, return before it is done. Raises GraddotError."""
        self.scores.flush(wait=False)
        self.metrics.flush(wait=False)
        self._thread.wait() if wait else self._thread.check()

    def save(self, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
        """Save the rows so far, then `state` as it is after `step`, in this order.

        For what `state` may hold and what is raised see `checkpoint.save_checkpoint`.
        """
        self.flush()
        path = save_checkpoint(self.path / "checkpoints", step, state, keep)
        with writing(path):
            (self.path / self._NONE_YET).unlink(missing_ok=True)
        return path

    def record(self, **measured: Any) -> None:
        """Add figures of JSON types, such as overhead=0.03, to "measured" in config.json."""
        config = read_config(self.path)
        config["measured"] = {**config.get("measured", {}), **measured}
        write_config(self.path, config)

    def close(self) -> None:
        """Let another process write the run, once what is being saved is."""
        self._thread.close()
        os.close(self._lock)

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        try:
            if exc_type is None:
                self.flush()
        finally:
            self.close()


def _check_whole(scores: Path, last: int) -> None:
    """Raise GraddotError if a part of steps up to `last` is gone, as from half a copy of a run."""
    step = first_missing(scores)
    if step <= last:
        raise GraddotError(
            f"{scores}: the scores of step {step} are missing, and the run would go on from step"
            f" {last + 1}; bring the files that were here back, or start a new run"
        )


def _foreign(path: Path) -> bool:
    """Whether a file is none of those that a `create` that was killed may leave."""
    ours = path.name in ("lock", RunDirectory._NONE_YET.name) or path.name.startswith(TEMPORARY)
    return path.is_file() and not ours
