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
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch

from graddot_lm.background import BackgroundWriter, WriterThread
from graddot_lm.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from graddot_lm.errors import GraddotError
from graddot_lm.files import TEMPORARY, remove_temporary, sync, write_atomic, writing

SCORES = pa.schema(
    {
        "step": pa.int64(),
        "sample_id": pa.int64(),
        "domain": pa.dictionary(pa.int32(), pa.string()),
        "offset": pa.int64(),
        "n_tokens": pa.int32(),
        "loss": pa.float32(),
        "dot": pa.float64(),
        "lr": pa.float64(),
        "value": pa.float64(),
    }
)
METRICS = pa.schema(
    {
        "step": pa.int64(),
        "train_loss": pa.float64(),
        "val_loss": pa.float64(),
        "lr": pa.float64(),
        "tokens_per_s": pa.float64(),
    }
)
KINDS = ("scores", "metrics")


def scores_schema(targets: Sequence[str] = (), norms: bool = False) -> pa.Schema:
    """`SCORES`, or for several targets the same with a dot_<target> and value_<target> of each;
    with norms also norm and cosine, or cosine_<target> of each."""
    if not targets and not norms:
        return SCORES
    fields, own = list(SCORES), ["cosine"] if norms else []
    if targets:
        fields, own = [f for f in fields if f.name not in ("dot", "value")], ["dot", "value", *own]
    names = ["norm"] if norms else []
    names += [f"{name}_{target}" for target in targets for name in own] if targets else own
    return pa.schema([*fields, *(pa.field(name, pa.float64()) for name in names)])


# Rows


class Part(NamedTuple):
    """A file of rows; its name says which steps, and which of how many processes wrote it."""

    first: int
    last: int
    rank: int
    world: int
    path: Path


def _parts(folder: Path) -> list[Part]:
    """The parts in a folder, in the order of their steps."""
    found = []
    for path in folder.glob("part-*-*.parquet"):
        form = r"part-(\d+)-(\d+)(?:-rank(\d+)of(\d+))?\.parquet"
        if match := re.fullmatch(form, path.name):
            rank, world = int(match[3] or 0), int(match[4] or 1)
            found.append(Part(int(match[1]), int(match[2]), rank, world, path))
    return sorted(found)


def _readable(folder: Path) -> list[Part]:
    """The parts that all processes have written, in the order of their steps."""
    parts = _parts(folder)
    written = Counter((part.first, part.last, part.world) for part in parts)
    return [part for part in parts if written[part.first, part.last, part.world] == part.world]


def _part_path(folder: Path, first: int, last: int, rank: int, world: int) -> Path:
    who = f"-rank{rank}of{world}" if world > 1 else ""
    return folder / f"part-{first:08d}-{last:08d}{who}.parquet"


def _encode(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(table.unify_dictionaries(), sink, compression="zstd")
    return sink.getvalue()


def _array(field: pa.Field, values: Any) -> pa.Array:
    """A copy of `values` in the field's type; TypeError if they are of another kind."""
    if isinstance(values, list | tuple):
        return pa.array(values, field.type)
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    dtype = field.type.to_pandas_dtype()
    return pa.array(np.array(values).astype(dtype, casting="same_kind"), field.type)


class PartWriter:
    """Rows of one kind: gathered in memory, saved as one more part by each `flush`."""

    def __init__(self, folder: Path, schema: pa.Schema, rank: int = 0, world: int = 1) -> None:
        self.folder, self.schema = folder, schema
        self._rank, self._world = rank, world
        self._batches: list[pa.RecordBatch] = []
        self._first = 0
        self._last = self._saved = self._last_saved()

    def _last_saved(self) -> int:
        return max((part.last for part in _parts(self.folder)), default=-1)

    def append(self, rows: Mapping[str, Any], step: int) -> None:
        """Add rows of one step: for each column a list, or an `(N,)` array or tensor, which
        is copied, from a GPU once its kernels have run.

        A column that is left out holds nulls; `step` stands for the column of that name. A step's
        rows may come in several calls. Raises ValueError for a step before the last one or already
        saved, for an unknown column and for columns of different length, and TypeError for values
        of another kind.
        """
        if step < self._last or step <= self._saved:
            raise ValueError(f"step {step}: rows up to step {self._last} were given before")
        if unknown := set(rows) - set(self.schema.names):
            raise ValueError(f"columns {sorted(unknown)}: known are {self.schema.names}")
        lengths = {name: len(values) for name, values in rows.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns of different length: {lengths}")
        n = next(iter(lengths.values()))
        columns = {**rows, "step": np.full(n, step)}
        arrays = [
            _array(field, columns[field.name]) if field.name in columns else pa.nulls(n, field.type)
            for field in self.schema
        ]
        if not self._batches:
            self._first = step
        self._batches.append(pa.record_batch(arrays, schema=self.schema))
        self._last = step

    def flush(self) -> None:
        """Save the gathered rows; no more rows of their last step may follow.

        Raises GraddotError if they cannot be written, and then they stay gathered.
        """
        if not self._batches:
            return
        table = pa.Table.from_batches(self._batches, self.schema)
        path = _part_path(self.folder, self._first, self._last, self._rank, self._world)
        write_atomic(path, _encode(table))
        self._batches.clear()
        self._saved = self._last

    def truncate_after(self, step: int) -> None:
        """Drop all rows of later steps, and what was not saved. Raises GraddotError, and drops
        nothing, if the rows that stay have other columns, as those of a run with norms have."""
        kept = [part for part in _parts(self.folder) if part.first <= step]
        for part in kept[:1]:
            with reading(part.path):
                columns = pq.read_schema(part.path).names
            if columns != self.schema.names:
                raise GraddotError(
                    f"{self.folder}: holds rows with columns {columns}, and now come others,"
                    f" {self.schema.names}; repeat the run's settings, or choose another folder"
                )
        self._batches.clear()
        with writing(self.folder):
            # From the end, so that what a reader sees at any instant has no gap.
            for part in reversed(_parts(self.folder)):
                if part.first > step:
                    part.path.unlink()
                elif part.last > step:
                    self._shorten(part, step)
            sync(self.folder)
        self._last = self._saved = self._last_saved()

    def _shorten(self, part: Part, step: int) -> None:
        with reading(part.path):
            table = _open([part], self.schema).to_table(filter=pc.field("step") <= step)
        # First the content, then the name: at no instant are the rows there twice.
        write_atomic(part.path, _encode(table))
        last = pc.max(table["step"]).as_py()
        path = _part_path(self.folder, part.first, last, part.rank, part.world)
        os.replace(part.path, path)


def _open(parts: Sequence[Part], schema: pa.Schema) -> ds.Dataset:
    return ds.dataset([str(part.path) for part in parts], schema=schema, format="parquet")


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong while rows are read into a GraddotError."""
    try:
        yield
    except FileNotFoundError as error:
        raise GraddotError(f"{path}: changed while it was read (resumed?); try again") from error
    except (OSError, pa.ArrowException) as error:
        raise GraddotError(f"{path}: cannot be read: {error}") from error


def open_rows(run: str | Path, kind: str = "scores") -> ds.Dataset:
    """All saved "scores" or "metrics" of a run, to be streamed inside `reading(run)`.

    Domains come as plain strings, for each part has its own dictionary. Raises GraddotError if
    there is no run or no row.
    """
    read_config(run)
    folder = Path(run) / kind
    parts = _readable(folder)
    if not parts:
        raise GraddotError(f"{folder}: nothing was saved yet")
    with reading(parts[0].path):
        schema = pq.read_schema(parts[0].path)
    fields = [f.with_type(pa.string()) if f.name == "domain" else f for f in schema]
    return _open(parts, pa.schema(fields))


def read_scores(run: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """All saved score rows of a run in the order of steps, all columns or those named.

    Within a step they are in the order of the joint batch, however many processes wrote them.

    Raises GraddotError if there is no run or no row, for an unknown column, and if a file cannot
    be read.
    """
    dataset = open_rows(run)
    names = dataset.schema.names if columns is None else list(columns)
    with reading(run):
        table = dataset.to_table(columns=[*names, *({"step"} - set(names))])
    steps = table["step"].to_numpy()
    if (np.diff(steps) < 0).any():  # parts of several processes
        table = table.take(np.argsort(steps, kind="stable"))
    table = table.select(names)
    if "domain" in table.column_names:
        index = table.column_names.index("domain")
        domains = table["domain"].dictionary_encode()
        table = table.set_column(index, "domain", domains)
    return table


# Settings


def read_config(run: str | Path) -> dict:
    """A run's config.json. Raises GraddotError if there is none."""
    path = Path(run) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise GraddotError(f"{run}: not a run's directory, for it has no config.json") from error
    except (OSError, ValueError) as error:
        raise GraddotError(f"{path}: cannot be read: {error}") from error


def _write_config(run: Path, config: Mapping) -> None:
    write_atomic(run / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def _flat(config: Mapping, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each setting in JSON, in which 1 and 1.0 differ and NaN equals itself."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)


def check_resume(
    run: str | Path, config: Mapping, may_differ: Sequence[str] = ("max_steps",)
) -> None:
    """Raise GraddotError naming each setting in which `config` differs from the run's own.

    `may_differ` names settings, or groups of settings, that a resumed run is free to change.
    """
    free = {*may_differ, "measured"}
    old, new = dict(_flat(read_config(run))), dict(_flat(config))
    differing = [
        f"  {key}: {old.get(key, 'not set')} before, {new.get(key, 'not set')} now"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and key not in free and key.split(".")[0] not in free
    ]
    if differing:
        raise GraddotError(
            f"{run}: cannot be resumed with other settings; repeat its own, or choose another "
            "folder:\n" + "\n".join(differing)
        )


# The run


@final
class RunDirectory:
    """A run that this process writes. Made by `create` or `resume`, and in the further processes
    of a run that has several, once the first has made it, by `join`; no other writes it then.

    `scores` and `metrics` take the rows, which one thread saves; what goes wrong there is raised by
    `check`, `flush` and `save`, which waits for the thread and then saves a checkpoint. Leaving a `with` block without an exception saves the rows that are left.
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
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
            try:  # a record lock, which a forked loader that outlives a killed run does not hold
                # Each process holds the byte of its number, the first one all until the run is
                # made: so it is not made while any process of an earlier start is still there.
                length = 1 if rank else 0  # 0 is all
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, length, rank)
            except (BlockingIOError, PermissionError) as error:
                os.close(self._lock)
                raise GraddotError(f"{path}: another process is writing this run") from error
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
        if path.exists() and not path.is_dir():
            raise GraddotError(f"{path}: is a file; a run needs a folder")
        if (path / "config.json").exists():
            raise GraddotError(f"{path}: holds a run; resume it, or choose another folder")
        with writing(path):
            if any(_foreign(file) for file in path.rglob("*")):
                raise GraddotError(f"{path}: holds other files; choose a new or empty folder")
        run = cls(path, targets, 0, world, bool(config.get("norms")))
        with writing(path):
            (path / cls._NONE_YET).touch()
        _write_config(path, config)  # last: it is what makes the folder a run
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

        Drops the rows of later steps; `world` need not be that of before. Raises GraddotError, and drops nothing, if settings differ
        (see `check_resume`), the checkpoints are lost or damaged, or another process has the run.
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
        for rows in (run.scores, run.metrics):
            rows.truncate_after(-1 if checkpoint is None else checkpoint.step)
        measured = read_config(path).get("measured")
        _write_config(path, {**config, "measured": measured} if measured else config)
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
        _write_config(self.path, config)

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


def _foreign(path: Path) -> bool:
    """Whether a file is none of those that a `create` that was killed may leave."""
    ours = path.name in ("lock", RunDirectory._NONE_YET.name) or path.name.startswith(TEMPORARY)
    return path.is_file() and not ours
