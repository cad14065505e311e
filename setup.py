"""Builds the extension with CMake (CMakeLists.txt) when pip builds or installs the package."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def run(*command: str) -> None:
    if subprocess.call(command) != 0:
        raise SystemExit("building graddot's compiled library failed: the reason is above")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            import torch
        except ImportError as e:
            raise SystemExit(
                "building graddot needs torch's headers: install torch, then run pip with"
                " --no-build-isolation"
            ) from e
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
            raise SystemExit(
                f"graddot needs torch 2.11 or newer, and here is {torch.__version__}: run"
                " pip install --upgrade torch, then try again"
            )
        # pip puts cmake beside Python, which is on no PATH where the environment is not activated.
        places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        cmake = shutil.which("cmake", path=places)
        if cmake is None:
            raise SystemExit("building graddot needs CMake 3.24 or newer: run pip install cmake")
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "GRADDOT_TORCH_DIR": torch.__path__[0],
            "GRADDOT_OUTPUT_DIR": str(output),
        }
        defines = [f"-D{name}={value}" for name, value in settings.items()]
        # What an earlier try found, as a compiler, is not what the user asks for now.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        run(cmake, "-S", str(ROOT), "-B", str(build), *defines)
        jobs = str(min(8, os.cpu_count() or 1))
        run(cmake, "--build", str(build), "--target", "_C", "-j", jobs)


setup(
    license="Apache-2.0",
    packages=[*find_packages(include=["graddot_kernels*"]), *find_packages("python")],
    package_dir={"graddot_lm": "python/graddot_lm"},
    ext_modules=[Extension("graddot_kernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
