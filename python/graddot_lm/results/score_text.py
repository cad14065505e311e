"""The figures of a run's scores (score_figures.py) as text for people."""

from collections.abc import Mapping, Sequence
from typing import Any
from unicodedata import combining, east_asian_width

from .excerpts import escape
from .score_figures import MEASURES, NOT_RECORDED

_LEFT_OUT = "scores that are not finite numbers or of steps not taken"


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
