"""The Triton kernels in Triton's interpreter, and the counts by which launchers divide work.

The interpreter has to be chosen before Triton is imported, so tests/interpreter runs in a process
of its own; its cases are seen with `TRITON_INTERPRET=1 pytest tests/interpreter`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from graddot_kernels.triton_kernels import config
from graddot_kernels.triton_kernels.config import TABLES, cdiv, packed, tile_for, wgrad_samples

ROOT = Path(__file__).resolve().parent.parent


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "tests/interpreter", "-x"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_ahead_of_time_row() -> None:
    """One target of `make aot`, cheap enough for every run: no wgmma lost, nothing spilled."""
    pytest.importorskip("triton")
    command = [sys.executable, "bench/aot.py", "--targets", "sm_90", "--only", "wgrad"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].endswith("targets=1 spilled=0 without_wgmma=0")


@pytest.mark.parametrize("op", TABLES)
@pytest.mark.parametrize("kind", ["half", "fp32", "tf32"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942", "small", "interpreter"])
def test_every_machine_has_a_tile(op: str, kind: str, arch: str) -> None:
    tile = tile_for(op, arch, kind)
    for side in (tile.rows, tile.cols, tile.depth):
        assert side & (side - 1) == 0
    assert tile.cols // tile.slices >= 1


@pytest.mark.parametrize("tokens, rows", [(1, 1), (2, 2), (3, 4), (17, 32), (64, 64), (65, 64)])
def test_packed(tokens: int, rows: int) -> None:
    assert packed(tokens, 64) == rows


@pytest.mark.parametrize("tiles, n", [(36, 32), (144, 32), (1024, 8), (1, 1), (144, 1), (3, 1000)])
def test_groups_of_samples_fill_the_chip(tiles: int, n: int) -> None:
    """Every sample is in one group, and splitting never costs more waves than not splitting."""
    tile = tile_for("wgrad", "sm_90", "half")
    samples = wgrad_samples(tiles, n, 1024, tile, 132)
    assert 1 <= samples <= n
    waves = cdiv(tiles * cdiv(n, samples), 132) * samples
    assert waves <= cdiv(tiles, 132) * n
    if tiles >= 36 and n >= 8:
        assert waves <= 1.25 * tiles * n / 132


def test_routes_by_counted_operations() -> None:
    tile = tile_for("wgrad", "sm_90", "half")
    assert config.fused_wgrad_is_cheaper(1, 1024, tile)
    assert not config.fused_wgrad_is_cheaper(1, 1, tile)
    assert config.joint_gram_is_cheaper(4, 8, 768, 768)
    assert not config.joint_gram_is_cheaper(32, 1024, 768, 3072)
