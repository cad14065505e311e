"""Runs of three domains for tests of the report."""

import argparse
import contextlib
import io

import numpy as np
from graddot_lm.results import report
from graddot_lm.training.run_directory import RunDirectory

DOMAINS = ["code", "math", "web\npage"]
SAMPLES, STEPS, N = 60, 30, 16
CONFIG = {
    "lr": 0.1,
    "coverage": {"covered": ["a.weight", "a.bias"], "excluded": ["wpe.weight"], "share": 0.875},
}


def write_run(path, columns, config=CONFIG, **record):
    with RunDirectory.create(path, config) as run:
        for step in np.unique(columns["step"]):
            here = {k: v[columns["step"] == step] for k, v in columns.items() if k != "step"}
            here["domain"] = [DOMAINS[i % 3] for i in here["sample_id"]]
            run.scores.append(here, int(step))
            run.metrics.append({"tokens_per_s": [100.0 + step**2]}, int(step))
            if step % 7 == 0:
                run.flush()
        run.record(**record)
    return path


def call(*arguments) -> int:
    """The exit status of `graddot scores` with them."""
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.run(parser.parse_args([str(a) for a in arguments]))


def printed(*arguments) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert call(*arguments) == 0
    return out.getvalue()
