# `make demo` and `make test` set everything up by themselves, in $(VENV). Other Python: make PYTHON=python3.12 test

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.10 python3.13 python3,$(if $(shell \
  $(p) -c 'import sys, venv, ensurepip; print(sys.version_info >= (3, 10))' 2>/dev/null | grep True),$(p))))
VENV ?= .venv
MAX_JOBS ?= 2
TEST_PROCESSES ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
GPU_TEST_PROCESSES ?= 4
BIN := $(VENV)/bin
# --no-build-isolation: compile against the torch in $(VENV); the constraints keep that torch in place
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
BUILD_INPUTS := setup.py pyproject.toml $(shell find csrc -type f -not -path '*/tests/*' -not -path '*/bench/*' 2>/dev/null)
BUILD_DIR ?= build/core

$(VENV)/.requirements: requirements-build.txt constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python >= 3.10 with venv found: make PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements-build.txt
	@touch $@

# editable: the kernels are compiled into aniso_ext/, so tests from the repository root import what was installed
$(VENV)/.installed: $(VENV)/.requirements $(BUILD_INPUTS)
	MAX_JOBS=$(MAX_JOBS) $(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

.PHONY: help
help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

.PHONY: install
install: $(VENV)/.installed ## create .venv, compile the kernels, install the package (editable)

.PHONY: demo
demo: install ## rendered shapes, an encoder, its gap, stand-ins, and language models trained on text alone; one table
	$(BIN)/aniso demo

.PHONY: test
test: install ## the CPU test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile -m "not gpu" $(PYTEST_ARGS)

.PHONY: test-gpu
test-gpu: install ## the tests that need a CUDA device; several processes, as Triton compiles on the CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(GPU_TEST_PROCESSES) --dist worksteal -m gpu $(PYTEST_ARGS)

.PHONY: lint
lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

.PHONY: format
format: install ## let ruff sort imports and apply its safe fixes
	$(BIN)/ruff check --fix .

.PHONY: core
core: ## build and test the torch-free C++ core with CMake; compile-checks CUDA where nvcc is present
	cmake -S . -B $(BUILD_DIR) -DCMAKE_BUILD_TYPE=Release
	cmake --build $(BUILD_DIR) --parallel $(MAX_JOBS)
	ctest --test-dir $(BUILD_DIR) --output-on-failure

.PHONY: bench
bench: install ## the CPU benchmarks, on one thread; rewrites the CSV and the README table
	mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest benchmarks --benchmark-json=build/benchmark.json $(PYTEST_ARGS)
	$(BIN)/python benchmarks/render_readme.py build/benchmark.json

.PHONY: bench-gpu
bench-gpu: install ## the GPU benchmarks; rewrites their CSV, the README tables and, with matplotlib, the figure
	$(BIN)/aniso bench kernels --out benchmarks/results $(BENCH_ARGS)
	$(BIN)/python benchmarks/render_readme.py
	$(BIN)/python -c 'import matplotlib' && $(BIN)/aniso bench figure benchmarks/results/h100_kernels.csv \
	  --out docs/figures/roofline.png

.PHONY: sanitize
sanitize: install core ## compute-sanitizer over the CUDA tests of the core and every kernel behind the operators
	csrc/tests/sanitize.sh $(BUILD_DIR)/csrc/tests $(BIN)/python

.PHONY: clean
clean: ## remove build products (keeps .venv)
	rm -rf build dist aniso_ext.egg-info demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find aniso_ext -name '*.so' -delete
	find aniso_ext python_tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(VENV)/.installed
