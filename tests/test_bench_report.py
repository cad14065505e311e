"""What the benchmarks share: time and energy of functions in turn."""

import importlib.util
import json
import time
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "bench" / "_report.py"


@pytest.fixture
def report():
    spec = importlib.util.spec_from_file_location("_report", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_energy_of_processors_that_report_it(report, tmp_path, monkeypatch):
    monkeypatch.setattr(report.torch.cuda, "is_available", lambda: False)
    assert report.joules(tmp_path) is None
    for package in range(2):
        folder = tmp_path / f"intel-rapl:{package}"
        folder.mkdir()
        (folder / "energy_uj").write_text(f"{1_500_000 * (package + 1)}\n")
    assert report.joules(tmp_path) == 4.5


def test_time_and_energy_are_each_function_s_own(report, monkeypatch):
    used = [0.0]
    monkeypatch.setattr(report, "joules", lambda: used[0])

    def work(seconds, joules):
        time.sleep(seconds)
        used[0] += joules

    functions = {"short": lambda: work(0.001, 1.0), "long": lambda: work(0.03, 5.0)}
    seconds, joules = report.time_and_energy(functions, repeats=3)
    assert joules == {"short": 1.0, "long": 5.0}
    assert 0.001 <= seconds["short"] < 0.03 <= seconds["long"]


def test_a_counter_that_is_missing_or_begins_again_leaves_no_energy(report, monkeypatch):
    monkeypatch.setattr(report, "joules", lambda: None)
    assert report.time_and_energy({"nothing": lambda: None}, repeats=1)[1] is None
    falling = iter(range(100, 0, -1))
    monkeypatch.setattr(report, "joules", lambda: next(falling))
    assert report.time_and_energy({"nothing": lambda: None}, repeats=1)[1] is None


def test_a_row_names_device_and_versions_where_there_is_no_git(report, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(report.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(report.torch.cuda, "get_device_name", lambda: "a GPU")
    report.append_row("some", {"figure": 1})
    row = json.loads((tmp_path / "some.jsonl").read_text())
    assert (row["commit"], row["device"], row["figure"]) == ("unknown", "a GPU", 1)
    assert {"python", "torch", "cuda"} <= row["versions"].keys()
