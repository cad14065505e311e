"""The grid of models and loops of tests/test_grid.py on a GPU, against float64 on a CPU."""

import pytest
from grid_cells import NOT_POSSIBLE, SUBJECTS, Cell
from test_grid import LOOPS


@pytest.mark.parametrize("loop", [name for name in LOOPS if name != "two-processes"])
@pytest.mark.parametrize("model", SUBJECTS)
def test_grid(model, loop, record_property):
    if reason := NOT_POSSIBLE.get((model, loop)):
        pytest.skip(reason)
    LOOPS[loop](Cell(model, record_property, device="cuda"))
