"""What a user meets first: the wheel, a missing or broken extension, and what was built."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from graddot_lm import doctor

import graddot_kernels
from graddot_kernels import _extension, ops

ROOT = Path(__file__).resolve().parent.parent


def import_elsewhere(folder: Path) -> subprocess.CompletedProcess[str]:
    """`import graddot_kernels` in a new process that sees the package in `folder` only."""
    code = "import graddot_kernels; print(graddot_kernels.build_info()['extension'])"
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "graddot_kernels", tmp_path / "graddot_kernels", ignore=ignore)
    return tmp_path


def test_without_the_extension_the_import_says_how_to_build_it(package_copy: Path) -> None:
    done = import_elsewhere(package_copy)
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "pip install --no-build-isolation" in done.stderr
    places = os.pathsep.join([str(package_copy), str(ROOT / "python")])
    command = [sys.executable, "-m", "graddot_lm.cli", "doctor"]
    environment = os.environ | {"PYTHONPATH": places}
    done = subprocess.run(
        command, check=False, cwd=package_copy, env=environment, capture_output=True, text=True
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("graddot doctor: graddot_kernels' compiled")


def test_an_extension_that_does_not_load_is_an_error_with_its_cause(package_copy: Path) -> None:
    (package_copy / "graddot_kernels" / "_C.abi3.so").write_bytes(b"not a library")
    done = import_elsewhere(package_copy)
    assert done.returncode != 0
    assert "does not load" in done.stderr
    assert re.search("file too short|invalid ELF header", done.stderr)


def test_build_info_names_an_implementation_of_every_op_on_each_device() -> None:
    info = graddot_kernels.build_info()
    assert info["version"] == graddot_kernels.__version__
    assert Path(info["extension"]).exists()
    assert info["torch"] == torch.__version__
    assert ("CUDA" in info["devices"]) == bool(info["cuda_architectures"])
    assert info["routes"].keys() == {
        str(name).split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("graddot::")
    }
    for name, devices in info["routes"].items():
        for device in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"graddot::{name}", device)
            assert devices[device].startswith("graddot_kernels.")
    embedding = [routes for name, routes in ops.routes.items() if name.startswith("embedding_")]
    for routes in embedding:
        assert routes["CPU"] == "graddot_kernels._C"
        assert (routes["CUDA"] == "graddot_kernels._C") == _extension.HAS_CUDA


def test_doctor_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    assert doctor.run(parser.parse_args([])) == 0
    printed = capsys.readouterr().out
    for text in (torch.__version__, "_C.abi3.so", "instruction set", "embedding_joint_wgrad_dot"):
        assert text in printed
    compiled = graddot_kernels.build_info()["instruction_set"]
    whose = f"the compiled library does ({compiled})" if compiled else "PyTorch does"
    assert f"inner work of torch_impl's linear layers and loss: {whose}" in printed


def unpacked_sdist(folder: Path) -> Path:
    """The source distribution, made from a copy, so that the source tree's own build folder is left
    alone, and unpacked into a folder of its own."""
    ignore = shutil.ignore_patterns("build", ".git", "*.so", ".*cache", "__pycache__", "results")
    shutil.copytree(ROOT, folder / "source", ignore=ignore)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", folder]
    subprocess.run(command, check=True, cwd=folder / "source")
    (sdist,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(sdist, folder / "an sdist")
    (source,) = (folder / "an sdist").iterdir()
    return source


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="building needs cmake")
def test_wheel_from_an_sdist(tmp_path: Path) -> None:
    source = unpacked_sdist(tmp_path)
    for directory in ("csrc", "tests/csrc"):
        every = {p.relative_to(ROOT) for p in (ROOT / directory).rglob("*") if p.is_file()}
        assert every == {
            p.relative_to(source) for p in (source / directory).rglob("*") if p.is_file()
        }
    # An earlier try with a compiler that is no more.
    platform = f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    cache = source / "build" / platform / "cmake" / "CMakeCache.txt"
    cache.parent.mkdir(parents=True)
    cache.write_text("CMAKE_CXX_COMPILER:FILEPATH=/no/such/compiler\n")
    # pip's cmake is taken where it is there, though the environment is not activated.
    path = os.environ["PATH"]
    if Path(sysconfig.get_path("scripts"), "cmake").exists():
        executable(tmp_path / "bin" / "cmake", "#!/bin/sh\nexit 1\n")
        path = f"{tmp_path / 'bin'}{os.pathsep}{path}"
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", tmp_path, source], check=True, env=os.environ | {"PATH": path})
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"graddot-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        names = archive.namelist()
    assert "graddot_kernels/_C.abi3.so" in names
    assert "graddot_lm/doctor.py" in names and "graddot_lm/rules/table.py" in names
    assert {n.split("/")[0].split("-")[0] for n in names} == {
        "graddot_kernels",
        "graddot_lm",
        "graddot",
    }
    done = import_elsewhere(tmp_path / "installed")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "installed/graddot_kernels/_C.abi3.so")


def test_a_torch_too_old_to_build_with_is_named(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("__version__ = '2.10.1+cpu'\n")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "-b", tmp_path, "-t", tmp_path],
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "torch 2.11 or newer, and here is 2.10.1+cpu" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="reads the Makefile with make")
def test_gpu_tests_are_of_what_is_installed(tmp_path: Path) -> None:
    """Not of the source tree that they are started in, by any Python from 3.10 on."""
    done = subprocess.run(
        ["make", "-n", "gpu-test", f"PYTHON={sys.executable}"],
        check=True, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    line = next(x for x in done.stdout.splitlines() if x.startswith("timeout"))
    words = shlex.split(line.rstrip("\\"))
    command = words[words.index(sys.executable) : words.index("-n")]
    assert not {"-P", "-I"} & set(command), "Python 3.10 has no -P, and -I leaves out PYTHONPATH"
    (tmp_path / "in_the_source_tree.py").touch()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_path.py").write_text(
        "from importlib.util import find_spec\n\n\n"
        "def test_path():\n    assert find_spec('in_the_source_tree') is None\n"
    )
    command += ["-p", "no:cacheprovider", "tests/test_path.py"]
    for workers in ([], ["-n", "1"]):
        subprocess.run([*command, *workers], check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)
