# Everything sets itself up: a virtual environment, the pinned packages, then the work.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c "" 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BENCH_VENV ?= .venv-bench
TRITON36_VENV ?= .venv-triton36
BIN = $(VENV)/bin
PIP_FLAGS = --quiet --disable-pip-version-check

.PHONY: setup quickstart test slurm check aot aot36 parity bench clean
setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit(f"Python 3.11 or 3.12 is needed, this is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: setup
	$(BIN)/python -m engine

# As many files at a time as there are workers, but for those whose tests are several processes at once. Triton's interpreter is
# chosen when triton is first imported: its tests have processes of their own.
WORKERS ?= 2
SEVERAL = tests/distributed tests/chaos
test: setup
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(SEVERAL:%=--ignore %) --ignore tests/slurm
	$(BIN)/python -m pytest $(SEVERAL)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) tests/interpreter

# Simulated clusters, for which there is no more than one at a time.
slurm: setup
	$(BIN)/python -m pytest tests/slurm

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Every kernel, compiled for every architecture without a GPU: registers, spills, shared memory.
aot: setup
	$(BIN)/python -m kernels.aot

# The same by the oldest triton that is supported, with the torch that brings it. On a machine without a GPU a CPU build of any torch
# will do, which asks for no triton of its own: make aot36 TORCH36=torch==2.13.0+cpu
TORCH36 ?= torch==2.11.*
$(TRITON36_VENV)/.ready:
	$(PYTHON) -m venv $(TRITON36_VENV)
	$(TRITON36_VENV)/bin/python -m pip install $(PIP_FLAGS) triton==3.6.0 '$(TORCH36)' numpy
	touch $@

aot36: $(TRITON36_VENV)/.ready
	$(TRITON36_VENV)/bin/python -m kernels.aot

# TRL lives in an environment of its own, so that nothing of ours depends on what it needs.
$(BENCH_VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev,bench]'
	touch $@

parity: $(BENCH_VENV)/.ready
	$(BENCH_VENV)/bin/python -m pytest tests/parity

bench: $(BENCH_VENV)/.ready
	$(BENCH_VENV)/bin/python benchmarks/sft_vs_trl.py

clean:
	rm -rf $(VENV) $(BENCH_VENV) $(TRITON36_VENV) build dist
