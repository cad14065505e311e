# Two commands for a newcomer: `make demo` and `make test`. Everything runs in .venv, made on demand.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Of thousands of files few are imported, and those are compiled then.
INSTALL := $(BIN)/pip install -q --no-compile
# The CPU build of torch unless told otherwise: `make TORCH=torch` takes the default build.
TORCH ?= torch==2.13.0
DEMO ?= demo
REPORT := build/tests.xml
# Tests that run beside one another: `make test WORKERS=8` where there are eight cores.
WORKERS ?= 2

.PHONY: demo test lint aot csrc-check bench bench-step bench-embedding bench-methods bench-micro bench-models bench-options bench-compile bench-selection exactness gpu-check gpu-build gpu-test gpu-kernels gpu-bench gpu-sanitize clean

$(VENV)/installed: pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h csrc/cuda/*)
	@echo "Setting up $(VENV): a few minutes the first time"
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(INSTALL) "$(TORCH)"
	$(INSTALL) "setuptools>=64" wheel "cmake>=3.25" ninja
	$(INSTALL) --no-build-isolation -e ".[dev]"
	touch $@

demo: $(VENV)/installed ## train a small GPT-2 on text of this machine, show which data helped
	PATH=$(abspath $(BIN)):$$PATH bash python/examples/demo.sh $(DEMO)

test: $(VENV)/installed ## everything that CI runs, on the CPU
	$(MAKE) -j 2 --output-sync=target lint csrc-check aot
	CUDA_VISIBLE_DEVICES= $(BIN)/pytest -n $(WORKERS) --dist worksteal --junitxml=$(REPORT)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

csrc-check: $(VENV)/installed ## C++ unit test under sanitizers, .cu compile, symbols of the stable ABI
	PATH=$(abspath $(BIN)):$$PATH csrc/check.sh

aot: $(VENV)/installed ## compile every Triton kernel for sm_80, sm_90, sm_100 and gfx942
	$(BIN)/python bench/aot.py

bench: bench-step bench-embedding bench-methods bench-micro bench-models bench-options bench-compile bench-selection

bench-step: $(VENV)/installed
	$(BIN)/python bench/bench_step.py

bench-embedding: $(VENV)/installed
	$(BIN)/python bench/bench_embedding.py

bench-methods: $(VENV)/installed ## every way to the scores, as N, V, T and K grow
	$(BIN)/python bench/bench_methods.py

bench-micro: $(VENV)/installed ## every family of ops beside its rivals, one after the other
	$(BIN)/python bench/test_micro.py

bench-models: $(VENV)/installed ## what scores add to a step, kind of model by kind of model
	$(BIN)/python bench/bench_models.py

bench-options: $(VENV)/installed ## what each of the engine's options adds to a step
	$(BIN)/python bench/bench_options.py

bench-compile: $(VENV)/installed ## what torch.compile gains and takes, with scores and without
	$(BIN)/python bench/bench_compile.py

bench-selection: $(VENV)/installed ## training on what scored best, and on a random choice
	$(BIN)/python bench/bench_selection.py

exactness: $(VENV)/installed ## docs/exactness.md: the errors that the last `make test` measured
	$(BIN)/python bench/exactness.py $(REPORT)

# Parts of `gpu-check`, each for itself, so that a machine lent for minutes takes them one by one. Each
# has a time, ten minutes in all, after which it is interrupted and says what it has seen; one that
# fails stops no other.
gpu-check: ## on a machine with a GPU, its own torch and nvcc
	$(MAKE) -k gpu-test gpu-kernels gpu-sanitize gpu-bench

gpu-build:
	$(PYTHON) -m pip install --no-build-isolation --no-deps .

SECONDS_AT_MOST = timeout -s INT -k 15
# What was installed, not the source tree, which has no compiled library. Python 3.10 has no -P for it.
GPU_TESTS = $(PYTHON) -c "import sys; sys.path = [x for x in sys.path if x]; import pytest; \
    sys.exit(pytest.main())" -vv --tb=short --maxfail=40
SANITIZER = $(or $(shell command -v compute-sanitizer),$(wildcard \
    $(dir $(realpath $(shell command -v nvcc)))compute-sanitizer /usr/local/cuda/bin/compute-sanitizer))

gpu-test: gpu-build ## kernels first, which say where to look, then whole steps
	failed=0; \
	$(SECONDS_AT_MOST) 140 $(GPU_TESTS) -n auto --maxprocesses=12 \
	    tests/gpu/test_kernels.py tests/gpu/test_embedding_kernels.py || failed=1; \
	$(SECONDS_AT_MOST) 90 $(GPU_TESTS) -n auto --maxprocesses=12 \
	    tests/gpu/test_steps.py tests/gpu/test_grid_on_gpu.py || failed=1; \
	exit $$failed

gpu-kernels: gpu-build ## rows for bench/results/: every kernel beside its floor and its rivals
	$(SECONDS_AT_MOST) 90 $(PYTHON) bench/gpu_kernels.py --rounds 10

gpu-bench: gpu-build ## and whole steps
	failed=0; \
	$(SECONDS_AT_MOST) 80 $(PYTHON) bench/bench_step.py || failed=1; \
	$(SECONDS_AT_MOST) 60 $(PYTHON) bench/bench_methods.py --architectures GPT2-Small \
	    --sweeps N V || failed=1; \
	exit $$failed

# Without torch's cache of memory, whose blocks hide what is read or written beside a tensor. Races are
# looked for in the CUDA kernels alone: the tool does not know the barriers of Triton's.
gpu-sanitize: export PYTORCH_NO_CUDA_MEMORY_CACHING = 1
gpu-sanitize: gpu-build ## every family of kernels, at its smallest shapes
	@test -n "$(SANITIZER)" || { echo "gpu-sanitize: compute-sanitizer is neither on PATH nor \
	beside nvcc; it comes with the CUDA toolkit" >&2; exit 1; }
	failed=0; \
	$(SECONDS_AT_MOST) 35 $(SANITIZER) --error-exitcode 1 $(GPU_TESTS) \
	    tests/gpu/test_embedding_kernels.py \
	    -k "layouts and int64 and (fp16 or fp32) and (random or equal) and plain" || failed=1; \
	$(SECONDS_AT_MOST) 25 $(SANITIZER) --tool racecheck --error-exitcode 1 $(GPU_TESTS) \
	    tests/gpu/test_embedding_kernels.py -k "layouts and int64 and fp32 and equal and plain" \
	    || failed=1; \
	$(SECONDS_AT_MOST) 50 $(SANITIZER) --error-exitcode 1 $(GPU_TESTS) tests/gpu/test_kernels.py \
	    -k "not test_fp32_direction and fp16 and \
	    (17-din or 1-din or (norm and shape2) or (cross_entropy and plain and 50257))" || failed=1; \
	exit $$failed

clean:
	rm -rf $(VENV) build *.egg-info graddot_kernels/*.so
