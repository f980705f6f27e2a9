# Everything runs in .venv, which these targets make and keep up to date; nothing has to be installed by hand.
#   make test PYTEST_ARGS="tests/cli -k help"     make demo DEMO_ARGS="--out /tmp/demo"     make test PYTHON=python3.12

PYTHON ?= python3
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
PEERS_ARGS ?=
GPU_ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv-peers/.ready

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup test test-full demo check lint format types docs bench bench-peers gpu gpu-wheels networks clean

help:  ## say what can be made
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(READY)  ## make .venv, or bring it up to date

test: $(READY)  ## the tests for every day, on two cores; PYTEST_ARGS="..." goes to pytest
	@$(BIN)/python .ci/suite.py test $(PYTEST_ARGS)

test-full: $(READY)  ## the long tests that `make test` leaves out, and only those
	@$(BIN)/python .ci/suite.py test-full $(PYTEST_ARGS)

networks: $(READY)  ## published networks through every link; downloads them
	@SPARSE_EXPORT_NETWORKS=1 $(BIN)/python -m pytest -q tests/networks $(PYTEST_ARGS)

demo: $(READY)  ## train dense and sparse, export, validate and compare, on data that comes along
	@$(BIN)/sparse-export demo $(DEMO_ARGS)

check: lint types test  ## lint, types and tests: what a change has to pass

lint: $(READY)  ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(READY)  ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(READY)  ## mypy, strict
	@$(BIN)/mypy

docs: $(READY)  ## the documents as a site, with the library's reference, into build/site; a broken link fails
	@$(BIN)/mkdocs build --strict

bench: $(READY)  ## time the mask update, then the training step; BENCH_ARGS="--rounds 5" goes to both
	@$(BIN)/python -m benchmarks.bench_mask_update $(BENCH_ARGS)
	@$(BIN)/python -m benchmarks.bench_training_step $(BENCH_ARGS)

bench-peers: $(READY) $(PEERS)  ## other programs with this one, in .venv-peers; PEERS_ARGS="--data-dir DIR --json FILE"
	@$(BIN)/python -m benchmarks.peers.run --peers-python .venv-peers/bin/python $(PEERS_ARGS)

# With the Python that is there, uninstalled: a machine with a card may have no network to install from.
gpu:  ## tests and measurements on a CUDA card, at most nine minutes; GPU_ARGS="--rehearse" runs it without one
	@"$(PYTHON)" -m benchmarks.gpu_session $(GPU_ARGS)

# What such a machine may lack beside torch, onnx and onnxruntime. There: python3 -m pip install --no-index --no-deps
# --target site gpu-wheels/*.whl, then PYTHONPATH=site make gpu.
gpu-wheels: $(READY)  ## what `make gpu` may need of packages, as wheels for Python 3.12, into gpu-wheels/
	@$(BIN)/python -m pip download -qq --disable-pip-version-check --no-deps --only-binary=:all: -c constraints.txt \
	  --python-version 3.12 --implementation cp --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
	  -d gpu-wheels pydantic pydantic-core annotated-types typing-inspection
	@ls gpu-wheels

clean:  ## remove .venv, caches and what builds left
	rm -rf .venv .venv-peers build dist gpu-wheels .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks .coverage *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The other programs want versions of their own, and nothing of them is needed to work on this one.
$(PEERS): benchmarks/peers/requirements.txt constraints.txt
	@"$(PYTHON)" -m venv --clear .venv-peers
	@echo "Installing into .venv-peers (several minutes and up to 8 GB) ..." >&2
	@.venv-peers/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
	  -r benchmarks/peers/requirements.txt >&2
	@touch $@

# The stamp is written last, so that an interrupted installation is taken up again. A .venv that was moved, or
# whose Python is gone, no longer answers and is made anew.
$(READY): pyproject.toml constraints.txt .ci/mend_stubs.py
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed; $(PYTHON) is: $$("$(PYTHON)" --version 2>&1 || true)." >&2; \
	  echo "Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv || { \
	  echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing into .venv (several minutes and up to 8 GB the first time) ..." >&2
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]' >&2
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
	  --target .venv/stubs tensorrt-stubs >&2 # beside the packages: it wants a TensorRT that it does not need
	@$(BIN)/python .ci/mend_stubs.py .venv/stubs
	@touch $@
