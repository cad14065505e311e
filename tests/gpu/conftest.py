"""Tests that need a GPU. Without one every case is skipped, by name and with the reason."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_checks import tf32

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: torch.cuda is not available"))


@pytest.fixture(autouse=True)
def true_fp32() -> Iterator[None]:
    """As on the CPU, where what is compared with runs."""
    with tf32(False):
        yield
