"""Rows of scores and metrics in Parquet parts: written process by process, read as one table.

Where they lie in a run, and why a reader never sees half of them: run_directory.py.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from graddot_lm.errors import GraddotError
from graddot_lm.files import reached, sync, write_atomic, writing
from graddot_lm.training.settings import read_config, recorded_config

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
        "applied": pa.bool_(),
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
    try:
        names = os.listdir(folder)  # Path.glob finds nothing where it may not look
    except (FileNotFoundError, NotADirectoryError):
        names = []
    for name in names:
        form = r"part-(\d+)-(\d+)(?:-rank(\d+)of(\d+))?\.parquet"
        if match := re.fullmatch(form, name):
            rank, world = int(match[3] or 0), int(match[4] or 1)
            found.append(Part(int(match[1]), int(match[2]), rank, world, folder / name))
    return sorted(found)


def _readable(folder: Path) -> list[Part]:
    """The parts that all processes have written, in the order of their steps."""
    parts = _parts(folder)
    written = Counter((part.first, part.last, part.world) for part in parts)
    return [part for part in parts if written[part.first, part.last, part.world] == part.world]


def first_missing(folder: Path) -> int:
    """The first step of which not all processes have a part, by the parts' names."""
    changes: defaultdict[int, Counter[int]] = defaultdict(Counter, {0: Counter()})
    for part in _parts(folder):
        changes[part.first][part.world] += 1
        changes[part.last + 1][part.world] -= 1
    written: Counter[int] = Counter()  # by the number of processes: how many of them wrote a step
    for step in sorted(changes):
        written.update(changes[step])
        if not any(count >= world for world, count in written.items()):
            return step
    raise AssertionError("behind the last part nothing is written")


def _part_path(folder: Path, first: int, last: int, rank: int, world: int) -> Path:
    who = f"-rank{rank}of{world}" if world > 1 else ""
    return folder / f"part-{first:08d}-{last:08d}{who}.parquet"


def _encode(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    table = table.unify_dictionaries()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def _array(field: pa.Field, values: Any) -> pa.Array:
    """A copy of `values` in the field's type; TypeError if they are of another kind."""
    if isinstance(values, list | tuple):
        return pa.array(values, field.type)
    if hasattr(values, "detach"):  # a tensor, told without torch, for which readers need not wait
        values = values.detach().cpu()
    dtype = field.type.to_pandas_dtype()
    return pa.array(np.array(values).astype(dtype, casting="same_kind"), field.type)


class PartWriter:
    """Rows of one kind: gathered in memory, saved as one more part by each `flush`."""

    def __init__(
        self, folder: str | Path, schema: pa.Schema, rank: int = 0, world: int = 1
    ) -> None:
        """Makes the folder if need be; raises GraddotError if it cannot be made."""
        self.folder, self.schema = Path(folder), schema
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
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
            raise ValueError(
                f"columns {sorted(unknown)}: the writer's schema has {self.schema.names}; for"
                " several targets or norms, make it with scores_schema(targets=[...], norms=True)"
            )
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
        nothing, if a part that stays cannot be opened, or has other columns, as those of a run with
        norms have."""
        kept = [part for part in _parts(self.folder) if part.first <= step]
        for part in kept:
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
    options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    form = ds.ParquetFileFormat(default_fragment_scan_options=options)
    with reading(parts[0].path.parent):
        return ds.dataset([str(part.path) for part in parts], schema=schema, format=form)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong while rows are read into a GraddotError."""
    try:
        yield
    except FileNotFoundError as error:
        raise GraddotError(f"{path}: changed while it was read (resumed?); try again") from error
    except (OSError, pa.ArrowException, UnicodeEncodeError) as error:
        raise GraddotError(f"{path}: cannot be read: {error}") from error


def open_rows(run: str | Path, kind: str = "scores") -> ds.Dataset:
    """All saved "scores" or "metrics" of a run, to be streamed inside `reading(run)`.

    Scores may also lie in a folder that is no run's: in one named scores, as the Trainer's
    output_dir has it, or in the folder itself, as that of a `PartWriter`. Domains come as plain
    strings, for each part has its own dictionary. Raises GraddotError if there is no run or no row.
    """
    folder = reached(Path(run) / kind)
    if kind == "scores" and not folder.exists() and _parts(Path(run)):
        folder = Path(run)
    parts = _readable(folder)
    if not parts:
        config = recorded_config(run) if folder.exists() else read_config(run)
        if kind == "scores" and config.get("method") == "Regular":
            raise GraddotError(
                f"{run}: was trained with --method Regular, so without scores; train with --method"
                " GradDotProd in another folder"
            )
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
