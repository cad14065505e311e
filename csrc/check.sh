#!/bin/sh
# Checks of the compiled code: the core's unit tests under sanitizers, also with clang where that is
# installed; the CUDA kernels run as plain C++, by the same unit test and by the tests of the
# embedding ops, and compiled for every architecture (where nvcc is installed); and that the library
# needs nothing outside LibTorch's stable ABI, libc and libstdc++.
# Usage: csrc/check.sh [build-folder], with the Python that has torch first on PATH.
set -eu
cd "$(dirname "$0")/.."
source=$PWD
mkdir -p "${1:-build/check}"
build=$(cd "${1:-build/check}" && pwd)
cuda=OFF
if command -v nvcc >/dev/null 2>&1 || [ -x /usr/local/cuda/bin/nvcc ]; then cuda=ON; fi

# -ffast-math stands for flags that a builder's environment may have: results must not depend on it.
cmake -S . -B "$build" -DGRADDOT_OUTPUT_DIR="$build" -DGRADDOT_CHECK_CUDA=$cuda \
  -DCMAKE_CXX_FLAGS=-ffast-math \
  -DPython_EXECUTABLE="$(command -v python)" >/dev/null
cmake --build "$build" -j 2 \
  --target test_embedding test_dense test_cuda_on_host cuda_on_host _C >/dev/null
"$build/test_embedding"
"$build/test_dense"
clang=${CLANG:-clang++}
if echo 'int main() {}' | "$clang" -fsanitize=address,undefined -x c++ - -o "$build/probe" 2>/dev/null
then
  cmake -S . -B "$build/clang" -DCMAKE_CXX_COMPILER="$clang" -DCMAKE_CXX_FLAGS=-Wno-pass-failed \
    -DPython_EXECUTABLE="$(command -v python)" >/dev/null
  cmake --build "$build/clang" -j 2 --target test_embedding test_dense >/dev/null
  echo "The same with $clang:"
  "$build/clang/test_embedding"
  "$build/clang/test_dense"
fi
echo "The CUDA kernels as plain C++ (their stacks draw a warning from the address sanitizer):"
"$build/test_cuda_on_host"
for file in $(cd graddot_kernels && find . -name '*.py'); do
  install -D -m 644 "graddot_kernels/$file" "$build/cuda_on_host/graddot_kernels/$file"
done
(cd "$build/cuda_on_host" && python -m pytest -c "$source/pyproject.toml" \
  "$source/tests/test_embedding.py" -k "not number_of_threads")

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
