#!/bin/sh
# Checks of the compiled code that need no Python test runner: the core's unit test under
# sanitizers, the CUDA kernels compiled for every architecture (where nvcc is installed), and that
# the library needs nothing outside LibTorch's stable ABI, libc and libstdc++.
# Usage: csrc/check.sh [build-folder], with the Python that has torch first on PATH.
set -eu
cd "$(dirname "$0")/.."
mkdir -p "${1:-build/check}"
build=$(cd "${1:-build/check}" && pwd)
cuda=OFF
if command -v nvcc >/dev/null 2>&1 || [ -x /usr/local/cuda/bin/nvcc ]; then cuda=ON; fi

cmake -S . -B "$build" -DGRADDOT_OUTPUT_DIR="$build" -DGRADDOT_CHECK_CUDA=$cuda \
  -DPython_EXECUTABLE="$(command -v python)" >/dev/null
cmake --build "$build" --target test_embedding test_dense _C -j 2 >/dev/null
"$build/test_embedding"
"$build/test_dense"

# "U name" and "U name@VERSION", by the only origins that every torch from 2.11 on offers.
nm -D --undefined-only "$build/_C.abi3.so" >"$build/symbols"
outside=$(sed 's/^ *[Uw] //' "$build/symbols" |
  grep -Ev '^(aoti_torch_|torch_)|@(GLIBC|GLIBCXX|CXXABI|GCC)_|^(__gmon_start__|_ITM_)' || true)
if [ -n "$outside" ]; then
  echo "symbols outside the stable ABI:" "$outside" >&2
  exit 1
fi
echo "stable ABI: every undefined symbol of _C.abi3.so is in it"

if [ $cuda = ON ]; then
  cmake --build "$build" --target check_cuda -j 2 >/dev/null
  echo "CUDA code compiles:" "$(nvcc --version | sed -n 's/.*release \([0-9.]*\).*/nvcc \1/p')"
else
  echo "CUDA code not compiled: no nvcc"
fi
