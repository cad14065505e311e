"""`graddot scores`: what a run's scores say, from the run's directory alone."""

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import combining, east_asian_width

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset as ds
from pyarrow import acero

from graddot_lm.data import TokenData
from graddot_lm.errors import GraddotError, printable
from graddot_lm.files import write_atomic, writing
from graddot_lm.load_tokenizer import load_tokenizer
from graddot_lm.settings import recorded_config
from graddot_lm.store import open_rows, reading
from graddot_lm.token_writer import SPLITS

EXCERPT = 80
MEASURES = ("value", "dot")
_LEFT_OUT = "scores that are not finite numbers or of steps not taken"
NOT_RECORDED = "(not recorded)"
Steps = tuple[int | None, int | None]


# From rows to figures


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


def _targets(rows: ds.Dataset) -> list[str]:
    """Empty where there is a single one, which has no name."""
    return [name.removeprefix("dot_") for name in rows.schema.names if name.startswith("dot_")]


def _columns(rows: ds.Dataset, target: str | None) -> dict[str, pc.Expression]:
    """The score columns of the target asked for, under the names that they have without one."""
    targets = _targets(rows)
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
    why = _add_excerpts(config, shown) if shown else None
    validation = _validation(config, target) if shown and not why else []
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
    return {name: summarize(run, 0, by, steps, name, rows=rows) for name in _targets(rows)}


def _named(steps: Steps) -> str:
    return ":".join("" if step is None else str(step) for step in steps)


# Excerpts


def escape(text: str, width: int = EXCERPT) -> str:
    """The start of `text` on one line of at most `width` characters, control characters escaped."""
    shown = ""
    for char in text:
        plain = char.isprintable() and char != "\\"
        piece = char if plain else char.encode("unicode_escape", "surrogatepass").decode("ascii")
        if len(shown) + len(piece) > width:
            return shown[: width - 1] + "…"
        shown += piece
    return shown


def _texts(config: dict, data: TokenData, sample_ids: Sequence[int]) -> list[str]:
    """The beginning of each sample, to be shown. Raises GraddotError."""
    # The copy in the data folder is the tokenizer that wrote it, whatever became of the named one.
    own = (data.root / "tokenizer.json").exists()
    if not own and "tokenizer" not in config:
        raise GraddotError("config.json names no tokenizer")
    tokenizer = load_tokenizer(str(data.root) if own else config["tokenizer"])
    texts = []
    for sample_id in sample_ids:
        # A token of several characters is common, one of less than one (a byte) is not.
        tokens = data.token_ids(sample_id)[: 4 * EXCERPT].tolist()
        texts.append(escape(tokenizer.decode(tokens, skip_special_tokens=False)))
    return texts


def _add_excerpts(config: dict, samples: list[dict[str, Any]]) -> str | None:
    """Give each sample an "excerpt"; returns why there are none, if so."""
    if not config:
        return "there is no config.json, which would name the data"
    for key in ("data_dir", "block_size"):
        if key not in config:
            return f"config.json names no {key}"
    folder = config["data_dir"]
    try:
        data = TokenData(folder, block_size=config["block_size"])
        if not _is_of_run(config, data):
            return f"{folder}: tokenized anew or otherwise; not the data of this run"
        for sample in samples:
            sample_id = sample["sample_id"]
            place = (data.domain_of([sample_id])[0], int(data.offset_of([sample_id])[0]))
            if place != (sample["domain"], sample["offset"]):
                return f"{folder}: sample {sample_id} is elsewhere; not the data of this run"
        texts = _texts(config, data, [sample["sample_id"] for sample in samples])
    except GraddotError as error:
        return str(error)
    for sample, text in zip(samples, texts, strict=True):
        sample["excerpt"] = text
    return None


def _is_of_run(config: dict, data: TokenData) -> bool:
    """Whether it is what the run recorded: other text may have as many tokens in every domain."""
    if config.get("data_fingerprint", data.fingerprint) != data.fingerprint:
        return False
    recorded = config.get("data_content")
    return recorded is None or recorded[SPLITS.index(data.split)] == data.content


def _validation(config: dict, target: str | None) -> list[dict[str, Any]]:
    """The validation samples that the scores are about, with an excerpt each.

    Empty if the run did not record them, or other data is in the place of theirs.
    """
    ids = config.get("val_sample_ids", [])
    if not ids:
        return []
    try:
        data = TokenData(config["data_dir"], "val", block_size=config["block_size"])
        if not _is_of_run(config, data):
            return []
        if config.get("target_per_domain"):
            ids = [i for i in ids if data.domain_of([i]) == [target]]
        texts = _texts(config, data, ids)
        places = zip(ids, data.domain_of(ids), data.offset_of(ids).tolist(), texts, strict=True)
    except GraddotError:  # `_add_excerpts` says why for the training samples
        return []
    names = ("sample_id", "domain", "offset", "excerpt")
    return [dict(zip(names, place, strict=True)) for place in places]


# From figures to text


def _number(value: float | None, form: str = ".3e") -> str:
    return "-" if value is None else format(value, form)


def _width(text: str) -> int:
    """Columns of a terminal: Chinese characters and the like take two, accents put on others none."""
    wide = sum(east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(bool(combining(char)) for char in text)


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """A table in text; columns in `left` are flush left, the others right."""
    lines = [header, *rows]
    widths = [max(_width(line[i]) for line in lines) for i in range(len(header))]
    padded = lambda cell, space, i: cell + space if i in left else space + cell
    return "\n".join(
        "  ".join(
            padded(cell, " " * (width - _width(cell)), i)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _domains_text(domains: list[dict[str, Any]]) -> str:
    header = ["domain", "samples", "rows"]
    header += ["mean value", "std error", "mean dot", "std error", "positive", "summed value"]
    rows = [
        [escape(row["domain"], 40), f"{row['samples']:,}", f"{row['rows']:,}"]
        + [_number(row[f"{figure}_{name}"]) for name in MEASURES for figure in ("mean", "error")]
        + [f"{row['positive']:.1%}", _number(row["summed_value"])]
        for row in domains
    ]
    return _aligned(header, rows, left=[0])


def _matrix_text(summaries: Mapping[str, dict[str, Any]], by: str) -> str:
    """Mean and standard error of every training domain (rows) for every target (columns)."""
    figures = lambda row: f"{_number(row[f'mean_{by}'])} ± {_number(row[f'error_{by}'], '.0e')}"
    cells = {
        (row["domain"], target): figures(row)
        for target, summary in summaries.items()
        for row in summary["domains"]
    }
    counts = {row["domain"]: row for s in summaries.values() for row in s["domains"]}
    # In the targets' own order, so that a domain's scores for itself lie on the diagonal.
    own = [name for name in summaries if name in counts]
    domains = own + sorted(counts.keys() - set(own))
    rows = [
        [escape(name, 40), f"{counts[name]['samples']:,}", f"{counts[name]['rows']:,}"]
        + [cells.get((name, target), "-") for target in summaries]
        for name in domains
    ]
    header = ["domain", "samples", "rows", *(escape(target, 40) for target in summaries)]
    return _aligned(header, rows, left=[0])


def _samples_text(samples: list[dict[str, Any]], by: str) -> str:
    header = [f"summed {by}", "times", "sample_id", "domain", "offset", "text"]
    rows = [
        [_number(row[by]), str(row["times"]), str(row["sample_id"]), escape(row["domain"], 40)]
        + [_number(row["offset"], "d"), row.get("excerpt", NOT_RECORDED)]
        for row in samples
    ]
    return _aligned(header, rows, left=[3, 5])


def _validation_text(summary: dict[str, Any]) -> str:
    shown, count = summary["validation"], summary["validation_samples"]
    rows = [
        [str(row["sample_id"]), escape(row["domain"], 40), str(row["offset"]), row["excerpt"]]
        for row in shown
    ]
    table = _aligned(["sample_id", "domain", "offset", "text"], rows, left=[1, 3])
    which = f"the first {len(shown)} of {count}" if len(shown) < count else f"all {count}"
    return f"validation sequences, which the scores are about ({which}):\n{table}"


def _closing_lines(summary: dict[str, Any]) -> list[str]:
    rate, overhead = summary["throughput"], summary["overhead"]
    coverage = summary["coverage"]
    lines = ["throughput: no tokens/s in the metrics"]
    if rate["tokens_per_s"] is not None:
        median = f"{rate['tokens_per_s']:,.0f} tokens/s"
        lines = [f"throughput: {median}, the median of {rate['steps']:,} rows of metrics"]
    if overhead is None:
        lines.append("overhead: not measured")
    else:
        lines.append(f"overhead: {overhead:+.1%} over regular training on the same rows")
    if summary["overhead_over_regular_n"] is not None:
        lines[-1] += f", {summary['overhead_over_regular_n']:+.1%} on the training rows alone"
    if coverage is None:
        lines.append("parameters: not recorded")
    else:
        excluded = ", ".join(coverage["excluded"]) or "none"
        share = f"{coverage['share']:.1%} of the trainable elements"
        lines.append(
            f"parameters: {len(coverage['covered'])} scored, {share}; excluded: {excluded}"
        )
    return lines


def format_summary(summary: dict[str, Any]) -> str:
    """`summarize`'s figures as text."""
    by, (first, last) = summary["by"], summary["steps"]
    target = f", target {escape(summary['target'], 40)}" if summary["target"] else ""
    counts = f"{summary['rows']:,} scores of {summary['samples']:,} samples"
    blocks = [f"{summary['run']}: {counts}, steps {first} to {last}{target}"]
    if summary["rows_left_out"]:
        blocks[0] += f"\nleft out: {summary['rows_left_out']:,} {_LEFT_OUT}"
    blocks.append(_domains_text(summary["domains"]))
    for name, title in (("best", "highest"), ("worst", "lowest")):
        if summary[name]:
            text = _samples_text(summary[name], by)
            blocks.append(f"{name} sequences, {title} summed {by} first:\n{text}")
    if summary["best"] and not summary["worst"]:
        blocks[-1] += "\nworst sequences: there are no others"
    if summary["validation"]:
        blocks.append(_validation_text(summary))
    closing = _closing_lines(summary)
    if summary["no_excerpts"]:
        closing.insert(0, f"no text shown: {summary['no_excerpts']}")
    return "\n\n".join([*blocks, "\n".join(closing)])


def format_targets(summaries: Mapping[str, dict[str, Any]]) -> str:
    """`summarize_targets`' figures as text."""
    first = next(iter(summaries.values()))
    by, (start, end) = first["by"], first["steps"]
    counts = f"{first['rows']:,} scores of {first['samples']:,} samples"
    blocks = [
        f"{first['run']}: {counts} for each of {len(summaries)} targets, steps {start} to {end}"
    ]
    for target, summary in summaries.items():
        if left_out := summary["rows_left_out"]:
            blocks[0] += f"\nleft out for {escape(target, 40)}: {left_out:,} {_LEFT_OUT}"
    matrix = _matrix_text(summaries, by)
    blocks.append(f"mean {by} ± standard error, by training domain (rows) and target:\n{matrix}")
    blocks.append("sequences that help and hurt a target: --target NAME")
    return "\n\n".join([*blocks, "\n".join(_closing_lines(first))])


def format_report(
    run: str | Path,
    top: int = 5,
    by: str = "value",
    steps: Steps = (None, None),
    target: str | None = None,
) -> str:
    """The text that `graddot scores` prints. Raises GraddotError; see `summarize`."""
    if target is None and _targets(open_rows(run)):
        return format_targets(summarize_targets(run, by, steps))
    return format_summary(summarize(run, top, by, steps, target))


# Command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `graddot scores`."""
    add = parser.add_argument
    add(
        "run",
        metavar="RUN",
        help="a run's directory, the output_dir of a Trainer, or a folder of scores",
    )
    add(
        "--top",
        type=int,
        default=5,
        metavar="N",
        help="how many of the best and of the worst sequences to show (default: %(default)s)",
    )
    add(
        "--by",
        choices=MEASURES,
        default="value",
        help="what ranks domains, by mean, and sequences, by sum: the value, which counts the "
        "learning rate and the share in the batch, or the dot product (default: %(default)s)",
    )
    add(
        "--steps",
        default=":",
        metavar="A:B",
        help="count steps A to B only, both included; either may be left out (default: all)",
    )
    add(
        "--target",
        metavar="NAME",
        help="in a run with several targets, show this one's scores (default: compare all)",
    )
    add("--json", action="store_true", help="print JSON, with more figures, in place of text")
    add(
        "--csv",
        metavar="PATH",
        help="also write every sample's sums to this file, in the order of --by",
    )


def parse_steps(text: str) -> Steps:
    """Read "A:B", either of them possibly empty. Raises GraddotError."""
    match = re.fullmatch(r"\s*(\d{0,18})\s*:\s*(\d{0,18})\s*", text)  # of 64 bits
    if not match:
        raise GraddotError(f"--steps {text}: must be like 100:200, 100: or :200")
    first, last = (int(number) if number else None for number in match.groups())
    return first, last


def _finite(value: Any) -> Any:
    """`value` with null in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_csv(table: pa.Table, path: str) -> None:
    """Write a file whole or not at all; what is no file of its own, as /dev/stdout, is written to."""
    sink, place = pa.BufferOutputStream(), Path(path)
    pyarrow.csv.write_csv(table, sink)
    if place.is_symlink() or (place.exists() and not place.is_file()):
        with writing(place), open(place, "wb") as file:
            file.write(sink.getvalue())
    else:
        write_atomic(place, sink.getvalue())


def run(args: argparse.Namespace) -> int:
    """`graddot scores`: print the report of `args.run`; returns the exit status 0."""
    if args.top < 0:
        raise GraddotError(f"--top {args.top}: must be at least 0")
    steps = parse_steps(args.steps)
    if args.target is None and args.csv is None and _targets(open_rows(args.run)):
        summaries = summarize_targets(args.run, args.by, steps)
        compared = {"run": args.run, "by": args.by, "targets": summaries}
        _show(compared, args.json, format_targets(summaries))
        return 0
    rows = open_rows(args.run)
    samples = sample_table(args.run, args.by, steps, args.target, rows)
    summary = summarize(args.run, args.top, args.by, steps, args.target, samples, rows)
    if args.csv is not None:
        _write_csv(samples.sort_by([(args.by, "descending"), ("sample_id", "ascending")]), args.csv)
    _show(summary, args.json, format_summary(summary))
    return 0


def _show(figures: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(_finite(figures), indent=2) if as_json else printable(text))
