"""The grid of models and loops of tests/test_grid.py on a GPU, against float64 on a CPU."""

import pytest
import torch
from grid_cells import NOT_POSSIBLE, SUBJECTS, Cell
from test_grid import LOOPS


@pytest.fixture(autouse=True)
def true_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("loop", [name for name in LOOPS if name != "two-processes"])
@pytest.mark.parametrize("model", SUBJECTS)
def test_grid(model, loop, record_property):
    if reason := NOT_POSSIBLE.get((model, loop)):
        pytest.skip(reason)
    LOOPS[loop](Cell(model, record_property, device="cuda"))
