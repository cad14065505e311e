"""Shared by all tests: helpers beside the tests are importable, and each process is one thread."""

import gc
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
# Tests fork, and a process forked while another thread holds a lock waits for it for ever: bars have no
# thread that looks after them, and no lock that processes share, which one that is killed would keep.
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())
# Nor has one a backward if its parent's first came after torch.compile, in a build of torch for CUDA: it
# started threads for the device that compiling pretends to have.
torch.ones((), requires_grad=True).backward()
# Tracing makes objects by the million and hardly a cycle: looking for those every 700 took a tenth of it.
gc.set_threshold(50_000, 20, 50)


def pytest_collection_modifyitems(items):
    """The longest first, which one of several workers would otherwise begin as the others end."""
    items.sort(key=lambda item: "kernels_in_the_interpreter" not in item.name)


def pytest_collection_finish():
    """What was imported is never garbage: Trainer collects several times a run, which looks through all of
    it, and in a process that was forked copies the memory that it is in."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # or nanobind, as the process ends, lists it as leaked


@pytest.fixture(autouse=True)
def _compiled_again():
    """A step that a test gave up leaves torch.compile as it was, once its engine is gone."""
    yield
    compiler = sys.modules.get("graddot_lm.compiling.compiler")
    if compiler is not None and compiler._stance is not None:
        # Among all that was imported looking takes seconds, so the young come first. Twice: the first may
        # find tensors that their graphs hold.
        for generation in (1, 1, 2, 2):
            if compiler._stance is not None:
                gc.collect(generation)
        assert compiler._stance is None, "compiled code would run uncompiled in the tests to come"


@pytest.fixture
def close(record_property):
    """Largest error of dots, relative to them or to a tenth of their Cauchy-Schwarz scale."""

    def check(got, want, tolerance, scale=None):
        bound = want.abs() if scale is None else torch.maximum(want.abs(), 0.1 * scale)
        error = ((got.double() - want).abs() / bound.clamp(min=1e-30)).max().item()
        record_property("relative_error", error)
        assert error <= tolerance, f"relative error {error:.1e} > {tolerance:.0e}"

    return check
