"""`graddot scores`: what a run's scores say, from the run's directory alone."""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from ..errors import GraddotError, printable
from ..files import reached, write_atomic, writing
from ..store import open_rows
from .score_figures import (
    MEASURES,
    Steps,
    sample_table,
    summarize,
    summarize_targets,
    target_names,
)
from .score_text import format_summary, format_targets


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
    sink, place = pa.BufferOutputStream(), reached(Path(path))
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
    if args.target is None and args.csv is None and target_names(open_rows(args.run)):
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
