# make train · make test · make bench · make lint: each sets up .venv by itself. Arguments: make train ARGS="pr1855 --resume"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: train test bench lint check

train: $(VENV)/.train
	$(BIN)/python train.py $(ARGS)

# First with the Triton kernels (interpreted where there is no GPU), then the eager CPU implementations.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto $(ARGS)
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -n auto tests/test_contract.py

bench: $(VENV)/.bench
	$(BIN)/python -m niblick.bench.run $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.train: setup.py constraints.txt | check
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train]"
	@touch $@

$(VENV)/.test: $(VENV)/.train
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,test]" ruff
	@touch $@

# The rivals are packages for CUDA cards: where pip can have none of them, the bench shows them as missing.
$(VENV)/.bench: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,test,bench]" || { \
	  echo "without liger-kernel and cut-cross-entropy: not to be had here"; \
	  $(BIN)/python -m pip install --quiet --constraint constraints.txt nvidia-ml-py; }
	@touch $@

# What the two commands stand on, named before anything fails inside.
check:
	@command -v $(PYTHON) >/dev/null || { echo "expected Python 3.10 to 3.13 as $(PYTHON): found none (apt install python3 python3-venv)"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { echo "expected Python 3.10 to 3.13: found `$(PYTHON) --version` (make PYTHON=python3.12 ...)"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "expected Python's venv module: missing in $(PYTHON) (apt install python3-venv)"; exit 2; }
	@command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null || { \
	  echo "no C compiler: Triton needs one to launch kernels on a GPU (apt install gcc python3-dev)"; \
	  ! command -v nvidia-smi >/dev/null || exit 2; }
	@! command -v nvidia-smi >/dev/null || $(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || { \
	  echo "expected Python's headers, which Triton compiles with: found no Python.h (apt install python3-dev)"; exit 2; }
