# make demo   the whole pipeline at nano scale, then where its report is
# make test   everything that must hold before a commit
# make test-faults  every fault injected, hundreds of kills (about an hour)
# make lab    JupyterLab on the notebooks, on this machine only
# make export the package from the notebooks
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-faults lab export clean-runs

# the first Python between 3.11 and 3.13 wins
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info < (3,14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready
TESTED := .venv/.tested
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: $(READY)

$(READY): pyproject.toml configs/constraints.txt
	@test -n "$(PYTHON)" || { echo "make: K2 Lab needs Python 3.11, 3.12 or 3.13; none of them is on the PATH" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "make: $(PYTHON) cannot create a virtual environment; on Debian: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c configs/constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/k2lab pipeline --scale nano --campaign demo

# what only tests need; where DeepSpeed or bitsandbytes cannot be installed, their tests are skipped
$(TESTED): $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c configs/constraints.txt -e '.[test]' || echo "make: not all of '.[test]' could be installed; tests that need it will be skipped" >&2
	@touch $(TESTED)

# notebooks under test leave their runs in a folder of their own, so that runs/ holds what a person made
test: $(TESTED)
	$(BIN)/python tests/in_sync.py
	@runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && export K2LAB_LAB_RUNS_PATH="$$runs" && set -x && \
	  $(BIN)/nbdev-test && $(BIN)/python -m pytest -q tests

test-faults: $(TESTED)
	K2LAB_FAULTS=full $(BIN)/python -m pytest -q -s tests/test_faults.py tests/test_resume.py tests/test_distributed.py

lab: $(READY)
	$(BIN)/nbdev-install-hooks
	$(BIN)/jupyter lab --ip 127.0.0.1 $(if $(filter 0,$(shell id -u)),--allow-root) nbs

export: $(READY)
	$(BIN)/nbdev-export

clean-runs:
	rm -rf runs/scratch
