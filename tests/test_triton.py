"""The Triton kernels in Triton's interpreter, and the counts by which launchers divide work.

The interpreter has to be chosen before Triton is imported, so tests/interpreter runs in a process
of its own; its cases are seen with `TRITON_INTERPRET=1 pytest tests/interpreter`.
"""

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from kernel_checks import tf32

from graddot_kernels.triton_kernels import config
from graddot_kernels.triton_kernels.config import TABLES, cdiv, packed, tile_for, wgrad_samples

ROOT = Path(__file__).resolve().parent.parent


IN_THE_INTERPRETER = sorted(path.name for path in (ROOT / "tests/interpreter").glob("test_*.py"))


@pytest.mark.parametrize("file", IN_THE_INTERPRETER)
def test_kernels_in_the_interpreter(file: str) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", f"tests/interpreter/{file}", "-x"]
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


@pytest.mark.parametrize("hip, kind", [(None, "tf32"), ("7.0", "ieee")], ids=["nvidia", "amd"])
def test_tf32_is_for_the_matrix_units_that_have_it(hip, kind, monkeypatch) -> None:
    """On AMD's other than gfx942 Triton refuses it."""
    pytest.importorskip("triton")
    from graddot_kernels.triton_kernels.launch import precision

    monkeypatch.setattr(torch.version, "hip", hip)
    for allowed in (True, False):
        with tf32(allowed):
            assert precision(torch.zeros(2)) == (kind if allowed else "ieee")
            assert precision(torch.zeros(2).half()) == "ieee"
    assert not torch.backends.cuda.matmul.allow_tf32


def test_routes_by_counted_operations() -> None:
    tile = tile_for("wgrad", "sm_90", "half")
    assert config.fused_wgrad_is_cheaper(1, 1024, tile)
    assert not config.fused_wgrad_is_cheaper(1, 1, tile)
    assert config.joint_gram_is_cheaper(4, 8, 768, 768)
    assert not config.joint_gram_is_cheaper(32, 1024, 768, 3072)


def _gpu_bench():  # type: ignore[no-untyped-def]
    """bench/gpu_kernels.py as a module."""
    spec = importlib.util.spec_from_file_location("gpu_kernels", ROOT / "bench/gpu_kernels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("op", ["wgrad", "direction", "gram", "norm"])
def test_gpu_bench_rivals_compute_the_same(op: str) -> None:
    """The rivals and the bench's own check, on a CPU and small; descriptors need a GPU."""
    pytest.importorskip("triton")
    bench = _gpu_bench()
    torch.manual_seed(0)
    shapes = {"act": (3, 8, 16), "grad": (3, 8, 12), "direction": (12, 16)}
    shapes |= {"val_act": (2, 8, 16), "val_grad": (2, 8, 12)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    candidates = bench.functions(op, tensors)
    want = candidates["kernel"]()
    bench.check(op, tensors, want)
    want_dots = want[1] if op == "wgrad" else want
    for variant in {"kernel fp32 D", "kernel bias"} & set(candidates):
        bench.check(op, tensors, candidates[variant]())
    for rival in {"naive", "vmap", "two matmuls", "direction"} & set(candidates):
        got = candidates[rival]()
        if op == "direction":
            got = got.view(3, 8).sum(1)
        if op == "wgrad" and rival == "naive":
            torch.testing.assert_close(got[0], want[0])
            got = got[1]
        torch.testing.assert_close(got, want_dots, rtol=1e-4, atol=1e-3)


def test_gpu_bench_of_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides run, and the kernel is compared with float64."""
    bench, ran = _gpu_bench(), []

    def once(functions, rounds):  # type: ignore[no-untyped-def]
        ran.extend(functions)
        return {name: function() or 1e-3 for name, function in functions.items()}

    monkeypatch.setattr(bench, "timed", once)
    row = bench.measure_cross_entropy(1e15, 3e12, 5, rows=16, device="cpu")
    assert ran == ["kernel", "torch"] and 0 < row["of_floor"] < 0.01
    monkeypatch.setattr(bench, "relative_error", lambda got, want: 1e-2)
    with pytest.raises(AssertionError, match="cross entropy: relative errors"):
        bench.measure_cross_entropy(1e15, 3e12, 5, rows=16, device="cpu")


def test_gpu_bench_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    bench = _gpu_bench()
    bench.dry_run(["wgrad", "gram"])
    printed = capsys.readouterr().out
    assert printed.count("GFLOP") == 2 * len(bench.SHAPES)
    assert "small proj" in printed
    count = bench.counts(32, 4, 1024, 768, 768)["wgrad"]
    assert count.flops == 2 * 32 * 1024 * 768 * 768
    assert count.floor(1e15, 3e12) > count.flops / 1e15 * 0.99


def test_gpu_bench_goes_on_after_a_failure(monkeypatch, capsys) -> None:
    """A wrong kernel has no row; the other kernels have."""
    rows = []
    report = types.SimpleNamespace(append_row=lambda name, row: rows.append(row))
    monkeypatch.setitem(sys.modules, "_report", report)

    def wrong():  # type: ignore[no-untyped-def]
        raise AssertionError("gram: relative error 1.00e+00")

    good = {"op": "norm", "us": {"kernel": 1.0}}
    assert _gpu_bench().run({"gram, small": wrong, "norm, small": lambda: good}) == 1
    assert rows == [good]
    printed = capsys.readouterr().out
    assert "gram, small: no row" in printed and "gram: relative error" in printed
    assert printed.endswith("rows 1, failed 1\n")


def test_package_works_without_triton() -> None:
    """No Triton: the package imports, and the GPU route is the plain-PyTorch form."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "from graddot_kernels import ops\n"
        "assert set(ops.routes['linear_gram_dot'].values()) == {'graddot_kernels.torch_impl'}\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
