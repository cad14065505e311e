"""The closing table against plain numpy, and which runs and folders it can be made of."""

import csv
import errno
import json
import os

import numpy as np
import pytest
from graddot_lm.background import BackgroundWriter
from graddot_lm.errors import GraddotError
from graddot_lm.results import report, score_figures
from graddot_lm.store import PartWriter, scores_schema
from graddot_lm.training.run_directory import RunDirectory
from reported_runs import DOMAINS, SAMPLES, STEPS, N, call, printed, write_run


def made_rows() -> dict[str, np.ndarray]:
    """All rows of a run, by column. Domains differ in mean; steps 1 to STEPS."""
    rng = np.random.default_rng(0)
    ids = np.concatenate([rng.permutation(SAMPLES)[:N] for _ in range(STEPS)])
    dot = rng.normal(size=len(ids)) + ids % 3
    lr = np.repeat(np.linspace(1, 0.1, STEPS), N)
    return {
        "step": np.repeat(np.arange(1, STEPS + 1), N),
        "sample_id": ids,
        "offset": ids // 3 * 128,
        "dot": dot,
        "lr": lr,
        "value": lr / N * -dot,  # so that the two rank differently
    }


@pytest.fixture(scope="module")
def rows():
    return made_rows()


@pytest.fixture(scope="module")
def run_path(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("report") / "run"
    return write_run(path, rows, overhead=0.125, overhead_over_regular_n=-0.0625)


def close(found, wanted) -> bool:
    return found == pytest.approx(wanted, rel=1e-12)  # sums of 480 doubles, in any order


@pytest.mark.parametrize("by", ["value", "dot"])
@pytest.mark.parametrize("first, last", [(None, None), (5, 20), (None, 7), (30, None)])
def test_figures_are_those_of_numpy(run_path, rows, by, first, last):
    chosen = (rows["step"] >= (first or 0)) & (rows["step"] <= (last or STEPS))
    data = {name: column[chosen] for name, column in rows.items()}
    summary = score_figures.summarize(run_path, top=4, by=by, steps=(first, last))
    assert summary["rows"] == len(data["step"]) and summary["rows_left_out"] == 0
    assert summary["steps"] == [first or 1, last or STEPS]
    assert summary["samples"] == len(set(data["sample_id"]))

    for row in summary["domains"]:
        here = data["sample_id"] % 3 == DOMAINS.index(row["domain"])
        assert row["rows"] == here.sum()
        assert row["samples"] == len(set(data["sample_id"][here]))
        assert row["positive"] == (data[by][here] > 0).mean()
        for name in ("value", "dot"):
            column = data[name][here]
            assert close(row[f"mean_{name}"], column.mean())
            assert close(row[f"error_{name}"], column.std(ddof=1) / len(column) ** 0.5)
            assert close(row[f"summed_{name}"], column.sum())
    means = [row[f"mean_{by}"] for row in summary["domains"]]
    assert means == sorted(means, reverse=True) and len(means) == 3

    sums = {i: data[by][data["sample_id"] == i].sum() for i in set(data["sample_id"])}
    order = sorted(sums, key=sums.__getitem__)
    assert [row["sample_id"] for row in summary["worst"]] == order[:4]
    assert [row["sample_id"] for row in summary["best"]] == order[::-1][:4]
    for row in summary["best"] + summary["worst"]:
        assert close(row[by], sums[row["sample_id"]])
        assert row["times"] == (data["sample_id"] == row["sample_id"]).sum()
        assert row["offset"] == row["sample_id"] // 3 * 128
        assert row["domain"] == DOMAINS[row["sample_id"] % 3]

    rates = 100.0 + np.unique(data["step"]) ** 2
    assert summary["throughput"] == {"tokens_per_s": np.median(rates), "steps": len(rates)}


def test_text_shows_them_on_aligned_lines(run_path, rows):
    text = printed(run_path, "--top", 2)
    lines = text.splitlines()
    assert lines[0] == f"{run_path}: 480 scores of 60 samples, steps 1 to 30"
    assert lines[2].split()[:3] == ["domain", "samples", "rows"]
    assert [line.split()[0] for line in lines[3:6]] == ["code", "math", "web\\npage"]
    assert len({len(line) for line in lines[2:6]}) == 1
    code = rows["value"][rows["sample_id"] % 3 == 0]
    assert f"{code.mean():.3e}" in lines[3] and f"{(code > 0).mean():.1%}" in lines[3]
    assert text.count("summed value  times") == 2
    closing = [line for line in lines if line.startswith(("through", "overhead", "param", "no "))]
    assert closing == [
        "no text shown: config.json names no data_dir",
        f"throughput: {100 + (15**2 + 16**2) / 2:,.0f} tokens/s, the median of 30 rows of metrics",
        "overhead: +12.5% over regular training on the same rows, -6.2% on the training rows alone",
        "parameters: 2 scored, 87.5% of the trainable elements; excluded: wpe.weight",
    ]


def test_columns_are_aligned_where_characters_are_wide(tmp_path):
    names = ["math", "数学", "e\u0301tude"]
    with RunDirectory.create(tmp_path / "run", {}, targets=names[1:]) as run:
        columns = {f"{kind}_{name}": [1.0] * 3 for kind in ("dot", "value") for name in names[1:]}
        run.scores.append({"sample_id": [1, 2, 3], "domain": names, **columns}, 0)
    wide = {"数": 2, "学": 2, "\u0301": 0}
    taken = lambda line: sum(wide.get(char, 1) for char in line)
    for options, first in (((), 3), (("--target", names[1]), 2)):
        lines = printed(tmp_path / "run", *options).splitlines()
        assert len({taken(line) for line in lines[first : first + 4]}) == 1


def test_json_and_csv(run_path, rows, tmp_path, capsys):
    path = tmp_path / "samples.csv"
    assert call(run_path, "--json", "--top", 3, "--steps", "2:", "--csv", path, "--by", "dot") == 0
    shown = json.loads(capsys.readouterr().out)
    summary = score_figures.summarize(run_path, top=3, by="dot", steps=(2, None))
    assert shown.keys() == summary.keys()
    for name in ("domains", "best", "worst"):
        for found, wanted in zip(shown[name], summary[name], strict=True):
            assert found.keys() == wanted.keys() and found["domain"] == wanted["domain"]
            assert all(close(found[key], wanted[key]) for key in found if key != "domain")
    with open(path, newline="") as file:
        table = list(csv.DictReader(file))
    later = rows["step"] >= 2
    sums = np.bincount(rows["sample_id"][later], rows["dot"][later], minlength=SAMPLES)
    assert [int(row["sample_id"]) for row in table] == np.argsort(-sums).tolist()
    assert close([float(row["dot"]) for row in table], np.sort(sums)[::-1])
    assert {row["domain"] for row in table} == set(DOMAINS)


def test_pandas_reads_the_folder_of_scores(run_path, rows):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(run_path / "scores")
    assert frame["step"].tolist() == rows["step"].tolist()
    assert frame["dot"].tolist() == rows["dot"].tolist()


def test_no_sequences_are_shown_if_none_are_wanted(run_path, capsys):
    assert call(run_path, "--top", 0) == 0
    out = capsys.readouterr().out
    assert "sequences" not in out and "no text" not in out and "mean value" in out


def test_rows_that_are_not_finite_are_left_out_and_counted(tmp_path, rows, capsys):
    broken = {name: column.copy() for name, column in rows.items()}
    broken["value"][[3, 50]] = np.nan
    broken["value"][7] = np.inf
    broken["dot"][[9, 10]], broken["value"][[9, 10]] = np.nan, 0
    broken["applied"] = np.arange(len(broken["dot"])) != 20
    path = write_run(tmp_path / "run", broken)
    summary = score_figures.summarize(path)
    assert (summary["rows"], summary["rows_left_out"]) == (474, 6)
    counted = np.isfinite(broken["value"]) & np.isfinite(broken["dot"]) & broken["applied"]
    for name in ("value", "dot"):
        found = sum(row[f"summed_{name}"] for row in summary["domains"])
        assert close(found, broken[name][counted].sum())
    assert call(path, "--json") == 0
    assert "NaN" not in capsys.readouterr().out  # which is not JSON
    assert "left out: 6 scores that are not finite numbers or of steps not taken" in printed(path)
    assert score_figures.summarize(path, by="dot")["rows_left_out"] == 3


def test_a_number_that_is_missing_beside_equal_ones(tmp_path):
    """A file's statistics leave NaN out, and say that all its numbers are 2."""
    with RunDirectory.create(tmp_path / "run", {}) as run:
        rows = {"sample_id": [3, 4, 5], "dot": [2.0, 2.0, np.nan], "value": [1.0, 1.0, 1.0]}
        run.scores.append(rows, 0)
    summary = score_figures.summarize(tmp_path / "run")
    assert (summary["rows"], summary["rows_left_out"]) == (2, 1)


def test_the_error_of_a_measure_that_not_all_rows_have(tmp_path):
    """Over the root of how many there are, as its mean is over these."""
    with RunDirectory.create(tmp_path / "run", {}) as run:
        rows = {"sample_id": [3, 4, 5], "dot": [2.0, 3.0, 4.0], "value": [1.0, 2.0, None]}
        run.scores.append(rows, 0)
    (domain,) = score_figures.summarize(tmp_path / "run", by="dot")["domains"]
    assert close(domain["mean_value"], 1.5) and close(domain["error_value"], 0.5)
    assert close(domain["error_dot"], 1 / 3**0.5)


def test_a_single_row_has_no_standard_error(tmp_path):
    with RunDirectory.create(tmp_path / "run", {}) as run:
        run.scores.append({"sample_id": [3], "dot": [2.0], "value": [1.0]}, 0)
    (row,) = score_figures.summarize(tmp_path / "run")["domains"]
    assert row["domain"] == "(not recorded)" and row["error_dot"] is None
    text = printed(tmp_path / "run")
    for words in ("overhead: not measured", "parameters: not recorded", "no tokens/s"):
        assert words in text


def test_of_several_targets_one_is_shown(tmp_path):
    with RunDirectory.create(tmp_path / "run", {}, targets=("law", "code")) as run:
        rows = {"sample_id": [3], "dot_law": [2.0], "value_law": [1.0]}
        run.scores.append({**rows, "dot_code": [4.0], "value_code": [3.0]}, 0)
    with pytest.raises(GraddotError, match="name one of law, code"):
        score_figures.summarize(tmp_path / "run")
    with pytest.raises(GraddotError, match="--target art: unknown; known are law, code"):
        score_figures.summarize(tmp_path / "run", target="art")
    (row,) = score_figures.summarize(tmp_path / "run", target="code")["best"]
    assert (row["value"], row["dot"]) == (3.0, 4.0)


def test_equal_ids_in_several_domains_are_several_samples(tmp_path, capsys):
    """As a loop of one's own may number them."""
    writer = PartWriter(tmp_path / "scores", scores_schema())
    for step in range(3):
        columns = {"sample_id": [0, 1, 0, 1], "domain": ["law", "law", "code", "code"]}
        writer.append({**columns, "dot": [1.0, 2, 3, 4], "value": [4.0, 3, 2, 1]}, step)
    writer.flush()
    summary = score_figures.summarize(tmp_path, top=2)
    assert summary["samples"] == 4 and [row["samples"] for row in summary["domains"]] == [2, 2]
    place = lambda row: (row["domain"], row["sample_id"], row["value"], row["times"])
    assert [place(row) for row in summary["best"]] == [("law", 0, 12, 3), ("law", 1, 9, 3)]
    assert [place(row) for row in summary["worst"]] == [("code", 1, 3, 3), ("code", 0, 6, 3)]
    assert call(tmp_path, "--csv", tmp_path / "all.csv") == 0
    with open(tmp_path / "all.csv", newline="") as file:
        assert [row["value"] for row in csv.DictReader(file)] == ["12", "9", "6", "3"]


def test_more_than_there_is_may_be_asked_for(run_path, capsys):
    assert call(run_path, "--top", 10**30, "--steps", f":{10**17}") == 0
    assert len(capsys.readouterr().out.splitlines()) > SAMPLES


@pytest.mark.parametrize("csv_too", [False, True])
def test_a_run_that_is_still_written_is_read_at_one_instant(tmp_path, monkeypatch, capsys, csv_too):
    """A domain that comes up between two looks at the folder is in neither or both of the tables."""
    writer, opened = PartWriter(tmp_path / "scores", scores_schema()), score_figures.open_rows

    def write(step, domain):
        scores = {"dot": [1.0], "value": [float(step)]}
        writer.append({"sample_id": [step], "domain": [domain], **scores}, step)
        writer.flush()

    def open_and_write_on(*args):
        rows = opened(*args)
        step = 1 + writer._last
        write(step, f"domain {step}")
        return rows

    write(0, "domain 0")
    for module in (report, score_figures):
        monkeypatch.setattr(module, "open_rows", open_and_write_on)
    options = ["--csv", tmp_path / "all.csv"] if csv_too else []
    assert call(tmp_path, "--json", *options) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["rows"] == summary["samples"] == len(summary["domains"])
    if csv_too:
        assert len((tmp_path / "all.csv").read_text().splitlines()) == 1 + summary["rows"]


def test_every_target_of_a_run_that_is_still_written_has_the_same_rows(tmp_path, monkeypatch):
    writer, opened = (
        PartWriter(tmp_path / "scores", scores_schema(["a", "b"])),
        score_figures.open_rows,
    )

    def write_on():
        scores = {f"{name}_{target}": [1.0] for name in ("dot", "value") for target in "ab"}
        writer.append({"sample_id": [1], **scores}, 1 + writer._last)
        writer.flush()

    def open_and_write_on(*args):
        rows = opened(*args)
        write_on()
        return rows

    write_on()
    monkeypatch.setattr(score_figures, "open_rows", open_and_write_on)
    a, b = score_figures.summarize_targets(tmp_path).values()
    assert a["rows"] == b["rows"]


def test_a_csv_file_is_whole_or_not_there(run_path, tmp_path, monkeypatch):
    path, link = tmp_path / "samples.csv", tmp_path / "link.csv"
    link.symlink_to(path)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(GraddotError, match="samples.csv.*No space"):
        patch.setattr(os, "fsync", full)
        call(run_path, "--csv", path)
    assert not path.exists()
    assert call(run_path, "--csv", link) == 0  # as /dev/stdout is one, which must stay
    with open(path, newline="") as file:
        assert link.is_symlink() and len([*csv.DictReader(file)]) == SAMPLES


@pytest.mark.parametrize(
    "options, words",
    [
        (["--top", -1], "--top -1: must be at least 0"),
        (["--steps", "5"], "--steps 5: must be like"),
        (["--steps", f"{10**20}:"], "--steps 1000.*: must be like"),
        (["--steps", "31:"], "no scores in steps 31:"),
        (["--target", "law"], "the run has a single one"),
        (["--csv", "/no/such/folder/a.csv"], "/no/such/folder/a.csv.*No such file"),
    ],
)
def test_mistakes_are_named(run_path, options, words):
    with pytest.raises(GraddotError, match=words):
        call(run_path, *options)


@pytest.mark.parametrize("place", ["scores", "."])
@pytest.mark.parametrize("targets", [(), ("law", "code")], ids=["single", "several"])
def test_scores_are_read_without_a_config(tmp_path, capsys, place, targets):
    """As they lie in the Trainer's output_dir, or in the folder of a writer."""
    schema = scores_schema(targets)
    parts = [PartWriter(tmp_path / place, schema, rank, world=2) for rank in range(2)]
    for rank, writer in enumerate(map(BackgroundWriter, parts)):
        columns = {"sample_id": [3 + rank]}
        for k, suffix in enumerate([f"_{name}" for name in targets] or [""]):
            columns |= {f"dot{suffix}": [2.0 + k], f"value{suffix}": [1.0 + rank + k]}
        writer.append(columns, 0)
        writer.flush()
        if rank == 0:
            with pytest.raises(GraddotError, match="nothing was saved yet"):
                call(tmp_path)
    options = ["--target", "code"] if targets else []
    if targets:
        assert call(tmp_path) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"{tmp_path}: 2 scores of 2 samples for each of 2 targets, steps 0 to 0"
        assert lines[3].split() == ["domain", "samples", "rows", "law", "code"]
        means = ["1.500e+00", "±", "5e-01", "2.500e+00", "±", "5e-01"]
        assert lines[4].split() == ["(not", "recorded)", "2", "2", *means]
        with pytest.raises(GraddotError, match="--target: the run has several, name one of law"):
            call(tmp_path, "--csv", tmp_path / "samples.csv")
    assert call(tmp_path, *options) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}: 2 scores of 2 samples, steps 0 to 0" in out
    row = next(line for line in out.splitlines() if line.split()[2:3] == ["4"])
    first = "3.000e+00" if targets else "2.000e+00"
    assert row.split() == [first, "1", "4", "(not", "recorded)", "-", "(not", "recorded)"]
    assert "no text shown: there is no config.json" in out


def test_a_run_without_scores_says_so(tmp_path):
    RunDirectory.create(tmp_path / "run", {"method": "Regular"}).close()
    with pytest.raises(GraddotError, match="trained with --method Regular, so without scores"):
        call(tmp_path / "run")


def test_a_folder_without_scores_is_named(tmp_path):
    with pytest.raises(
        GraddotError, match="no: not a run's directory, for there is no such folder"
    ):
        call(tmp_path / "no")
    with pytest.raises(GraddotError, match="not a run's directory"):
        call(tmp_path)
    RunDirectory.create(tmp_path / "run", {}).close()
    with pytest.raises(GraddotError, match="run/scores: nothing was saved yet"):
        call(tmp_path / "run")
