"""What a run's scores say, in figures: by domain, by sample, and of the run as a whole.

Score rows are aggregated batch by batch as they are read, never held as a whole.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import acero

from ..errors import GraddotError
from ..store import open_rows, reading
from ..training.settings import recorded_config
from .excerpts import add_excerpts, validation_samples

MEASURES = ("value", "dot")
NOT_RECORDED = "(not recorded)"
Steps = tuple[int | None, int | None]  # the first and the last to count


def _in_steps(steps: Steps) -> pc.Expression:
    first, last = steps
    chosen = pc.scalar(True)
    if first is not None:
        chosen &= pc.field("step") >= first
    if last is not None:
        chosen &= pc.field("step") <= last
    return chosen


def _counted(columns: Mapping[str, pc.Expression], by: str) -> pc.Expression:
    """Rows that count: of steps that the optimizer took, with finite scores."""
    return pc.is_finite(columns[by]) & pc.is_finite(columns["dot"]) & columns["applied"]


def _grouped(
    rows: ds.Dataset,
    chosen: pc.Expression,
    columns: dict[str, pc.Expression],
    aggregates: Sequence[tuple],
    keys: Sequence[str] = (),
) -> pa.Table:
    """Aggregate batch by batch, so that only the groups are ever held."""
    scan = acero.ScanNodeOptions(rows, filter=chosen)  # skips files by their statistics alone
    nodes = [
        acero.Declaration("scan", scan),
        acero.Declaration("filter", acero.FilterNodeOptions(chosen)),
        acero.Declaration("project", acero.ProjectNodeOptions([*columns.values()], [*columns])),
        acero.Declaration("aggregate", acero.AggregateNodeOptions(list(aggregates), list(keys))),
    ]
    return acero.Declaration.from_sequence(nodes).to_table()


def target_names(rows: ds.Dataset) -> list[str]:
    """Empty where there is a single one, which has no name."""
    return [name.removeprefix("dot_") for name in rows.schema.names if name.startswith("dot_")]


def _columns(rows: ds.Dataset, target: str | None) -> dict[str, pc.Expression]:
    """The score columns of the target asked for, under the names that they have without one."""
    targets = target_names(rows)
    if target is None and targets:
        raise GraddotError(f"--target: the run has several, name one of {', '.join(targets)}")
    if target is not None and target not in targets:
        known = ", ".join(targets) or "none, the run has a single one"
        raise GraddotError(f"--target {target}: unknown; known are {known}")
    suffix = "" if target is None else f"_{target}"
    columns = {name: pc.field(name) for name in ("sample_id", "offset")}
    columns["domain"] = pc.coalesce(pc.field("domain"), pc.scalar(NOT_RECORDED))
    # Not recorded by a writer of one's own.
    recorded = [pc.field("applied")] if "applied" in rows.schema.names else []
    columns["applied"] = pc.coalesce(*recorded, pc.scalar(True))
    return {**columns, **{name: pc.field(name + suffix) for name in MEASURES}}


def _domain_table(
    rows: ds.Dataset, chosen: pc.Expression, columns: dict[str, pc.Expression], by: str
) -> pa.Table:
    sample = pc.VarianceOptions(ddof=1)
    aggregates: list[tuple] = [([], "hash_count_all", None, "rows")]
    for name in MEASURES:
        aggregates += [
            (name, "hash_mean", None, f"mean_{name}"),
            (name, "hash_variance", sample, f"variance_{name}"),
            (name, "hash_sum", None, f"summed_{name}"),
            (name, "hash_count", None, f"count_{name}"),  # the other of --by may not be recorded
        ]
    aggregates.append(("positive", "hash_mean", None, "positive"))
    columns = {**columns, "positive": (columns[by] > 0).cast(pa.float64())}
    table = _grouped(rows, chosen, columns, aggregates, ["domain"])
    for name in MEASURES:
        count = pc.cast(table[f"count_{name}"], pa.float64())
        error = pc.sqrt(pc.divide(table[f"variance_{name}"], count))
        table = table.append_column(f"error_{name}", error)
        table = table.drop_columns([f"variance_{name}", f"count_{name}"])
    return table.sort_by([(f"mean_{by}", "descending"), ("domain", "ascending")])


def sample_table(
    run: str | Path,
    by: str = "value",
    steps: Steps = (None, None),
    target: str | None = None,
    rows: ds.Dataset | None = None,
) -> pa.Table:
    """One row a sample: sample_id, domain, offset, times (rows), summed value and summed dot.

    Rows whose dot or `by` is not a finite number, and those of steps that the optimizer did not
    take, are left out. `rows` is `open_rows` of the run, if it is there already: a run that is
    still written has more of them from one opening to the next. Raises GraddotError.
    """
    rows = open_rows(run) if rows is None else rows
    columns = _columns(rows, target)
    aggregates: list[tuple] = [([], "hash_count_all", None, "times")]
    aggregates += [(name, "hash_sum", None, name) for name in MEASURES]
    # A sample has one place, which as a further key would cost time. Its domain is a key: a loop of
    # one's own may number the samples of each domain from 0.
    aggregates.append(("offset", "hash_one", None, "offset"))
    with reading(run):
        chosen = _in_steps(steps) & _counted(columns, by)
        table = _grouped(rows, chosen, columns, aggregates, ["sample_id", "domain"])
    return table.select(["sample_id", "domain", "offset", "times", *MEASURES])


def _first(samples: pa.Table, by: str, order: str, count: int) -> list[dict[str, Any]]:
    keys = [(by, order), ("sample_id", "ascending")]
    count = min(count, len(samples))
    picked = pc.select_k_unstable(samples, k=count, sort_keys=keys) if count else []
    return samples.take(picked).to_pylist() if count else []


def _extremes(samples: pa.Table, by: str, top: int) -> dict[str, list[dict[str, Any]]]:
    """The best and the worst samples; of few, none is both."""
    best = _first(samples, by, "descending", top)
    named = lambda row: (row["sample_id"], row["domain"])
    shown = {named(row) for row in best}
    worst = [row for row in _first(samples, by, "ascending", 2 * top) if named(row) not in shown]
    return {"best": best, "worst": worst[:top]}


def _throughput(run: str | Path, steps: Steps) -> dict[str, Any]:
    try:
        metrics = open_rows(run, "metrics")
        with reading(run):
            table = metrics.to_table(columns=["tokens_per_s"], filter=_in_steps(steps))
    except GraddotError as error:
        return {"tokens_per_s": None, "why": str(error)}
    rates = table["tokens_per_s"].drop_null().to_numpy()
    return {"tokens_per_s": float(np.median(rates)) if len(rates) else None, "steps": len(rates)}


def summarize(
    run: str | Path,
    top: int = 5,
    by: str = "value",
    steps: Steps = (None, None),
    target: str | None = None,
    samples: pa.Table | None = None,
    rows: ds.Dataset | None = None,
) -> dict[str, Any]:
    """Everything `graddot scores` shows, in JSON types.

    `by` ranks domains by mean and samples by sum; `steps` are the first and the last to count;
    `samples` is `sample_table` of the same arguments, if it is there already, and then `rows` what
    it is of. Raises GraddotError if the directory holds no scores of these steps.
    """
    rows = open_rows(run) if rows is None else rows
    config = recorded_config(run)
    columns = _columns(rows, target)
    inside = _in_steps(steps)
    counted = _counted(columns, by)
    extent = [("step", "min", None, "first"), ("step", "max", None, "last")]
    with reading(run):
        (span,) = _grouped(rows, inside, {"step": pc.field("step")}, extent).to_pylist()
        if span["first"] is None:
            raise GraddotError(f"{run}: no scores in steps {_named(steps)}")
        domains = _domain_table(rows, inside & counted, columns, by)
        # Not counted by the same filter: count_rows would trust a file's least and largest number,
        # which leave NaN out.
        left_out = rows.count_rows(filter=inside) - sum(domains["rows"].to_pylist())
    if samples is None:
        samples = sample_table(run, by, steps, target, rows)
    counts = samples.group_by("domain").aggregate([([], "count_all")])
    distinct = dict(zip(*(column.to_pylist() for column in counts.columns), strict=True))
    extremes = _extremes(samples, by, top)
    shown = [*extremes["best"], *extremes["worst"]]
    why = add_excerpts(config, shown) if shown else None
    validation = validation_samples(config, target) if shown and not why else []
    measured = config.get("measured", {})
    return {
        "run": str(run),
        "by": by,
        "target": target,
        "steps": [span["first"], span["last"]],
        "rows": sum(domains["rows"].to_pylist()),
        "rows_left_out": left_out,
        "samples": len(samples),
        "domains": [{**row, "samples": distinct[row["domain"]]} for row in domains.to_pylist()],
        **extremes,
        "validation": validation[:top],
        "validation_samples": len(validation),
        "no_excerpts": why,
        "throughput": _throughput(run, steps),
        "overhead": measured.get("overhead"),
        "overhead_over_regular_n": measured.get("overhead_over_regular_n"),
        "coverage": config.get("coverage"),
    }


def summarize_targets(
    run: str | Path, by: str = "value", steps: Steps = (None, None)
) -> dict[str, dict[str, Any]]:
    """`summarize`, without sequences, for every target of a run that has several, by name."""
    rows = open_rows(run)
    return {name: summarize(run, 0, by, steps, name, rows=rows) for name in target_names(rows)}


def _named(steps: Steps) -> str:
    return ":".join("" if step is None else str(step) for step in steps)
