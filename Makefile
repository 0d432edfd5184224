# `make demo` and `make test` do everything, set-up included, on a machine with Python and gcc.
.DEFAULT_GOAL := help
.PHONY: help demo emulation test lint bench bench-layers bench-arm readme-tables clean

PYTHON ?= python3
# For the CPU build of torch, say: make test TORCH="torch==2.13.0 --index-url <where it is>"
TORCH ?= torch==2.13.0
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
# A strict editable install links each file by name, so a new or renamed file needs a new install:
# the directories' times tell.
FOLDERS := tvm_pivot tvm_pivot/bench tvm_pivot/bench/runtimes tvm_pivot/demo tvm_pivot/prune \
	tvm_pivot/runner tvm_pivot/tuning relay_passes schedules
INSTALL := $(BIN)/python -m pip install --quiet --config-settings editable_mode=strict --editable

help:
	@echo "make demo          compile the shipped pruned network, check and time it"
	@echo "make test          run the tests"
	@echo "make lint          ruff and mypy"
	@echo "make emulation     fetch an ARM userland, so that make test runs ARM code too (qemu)"
	@echo "make bench         compare runtimes on the standing set of networks, half an hour"
	@echo "make bench-layers  time single layers, sparse against dense"
	@echo "make bench-arm     count what networks cost on ARM cores, under emulation, an hour"
	@echo "make readme-tables write the tables of README.md from the results"
	@echo "make clean         remove the environment, builds and caches"

demo: $(VENV)/.demo
	$(BIN)/python -m tvm_pivot.demo

# One thread for NumPy, two for the networks under test: workers run side by side.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 TVM_NUM_THREADS=2 $(BIN)/python -m pytest -n $(WORKERS) --durations=10

# Needs qemu-user and g++-aarch64-linux-gnu, which .ci/run installs.
emulation: $(VENV)/.dev
	PYTHON=$(BIN)/python tests/arm64_python.sh

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# From elsewhere: beside the sources mypy would miss the folders that are mapped into the package.
	cd $(VENV) && bin/mypy --config-file ../pyproject.toml -p tvm_pivot

bench: $(VENV)/.dev
	$(BIN)/tvm-pivot bench --install litert,deepsparse
	$(BIN)/python -m benchmarks.standing_set --html benchmarks/results/standing_set.html

bench-layers: $(VENV)/.dev
	$(BIN)/python -m benchmarks.layers --json benchmarks/results/layers.json

bench-arm: $(VENV)/.dev
	$(BIN)/tvm-pivot bench --install litert
	$(BIN)/python -m benchmarks.arm_cost setup
	$(BIN)/python -m benchmarks.arm_cost networks
	$(BIN)/python -m benchmarks.arm_cost kernels

readme-tables: $(VENV)/.dev
	$(BIN)/python -m benchmarks.readme_tables

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: pyproject.toml $(FOLDERS) | $(VENV)/.python
	$(INSTALL) ".[demo]"
	touch $@

# torch goes first and by itself, so that nothing else decides which build of it is installed.
$(VENV)/.torch: | $(VENV)/.python
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/.dev: pyproject.toml $(FOLDERS) | $(VENV)/.torch
	$(INSTALL) ".[dev]"
	touch $@ $(VENV)/.demo
