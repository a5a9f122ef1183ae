# make demo   the whole pipeline at nano scale, then where its report is
# make test   everything that must hold before a commit
# make test-quick   the part without trainings, kills and notebooks (under two minutes)
# make test-faults  every fault injected, hundreds of kills, every template and certificate (about an hour)
# make test-pythons  `make test` on every Python from 3.11 to 3.13 that is on the PATH
# make lint   ruff and pyright
# make notebooks    execute the notebooks and store what they show
# make lab    JupyterLab on the notebooks, on this machine only
# make export the package from the notebooks
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick test-faults test-pythons lint notebooks lab export clean-runs

# the first Python between 3.11 and 3.13 wins
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info < (3,14))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TESTED := $(VENV)/.tested
PLAIN := setup.py k2lab/__main__.py $(wildcard k2lab/cli/*.py k2lab/bench/*.py) $(addprefix k2lab/,corpus/formulas.py corpus/kernels.py corpus/signals.py tasks/jail.py tasks/sandbox.py lab/slurm.py models/mla.py serving/drafts.py serving/engine.py serving/protocol.py serving/responses.py serving/server.py text/typescript.py training/muon.py)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: $(READY)

$(READY): pyproject.toml configs/constraints.txt
	@test -n "$(PYTHON)" || { echo "make: K2 Lab needs Python 3.11, 3.12 or 3.13; none of them is on the PATH" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "make: $(PYTHON) cannot create a virtual environment; on Debian: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c configs/constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/k2lab pipeline --scale nano --campaign demo

# what only tests need; where DeepSpeed or bitsandbytes cannot be installed, their tests are skipped
$(TESTED): $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c configs/constraints.txt -e '.[test]' || echo "make: not all of '.[test]' could be installed; tests that need it will be skipped" >&2
	@touch $(TESTED)

# notebooks and tests leave their runs in a folder of their own, so that runs/ holds what a person made
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:warnings -n $(WORKERS) --dist loadfile --no-loadscope-reorder
ASIDE = runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && export K2LAB_LAB_RUNS_PATH="$$runs" && set -x

test: $(TESTED)
	$(BIN)/python tests/in_sync.py
	@$(ASIDE) && $(BIN)/python tests/notebooks.py --workers $(WORKERS) && $(PYTEST) tests

test-quick: $(TESTED)
	@$(ASIDE) && $(PYTEST) -m 'not slow' tests

# each Python gets an environment of its own, .venv-3.12
test-pythons:
	@for p in 3.11 3.12 3.13; do if python$$p -c '' 2>/dev/null; then $(MAKE) test PYTHON=python$$p VENV=.venv-$$p || exit 1; else echo "no python$$p here"; fi; done

lint: $(TESTED)
	$(BIN)/ruff check nbs tests $(PLAIN)
	$(BIN)/ruff check --isolated --select F,B --ignore B905 --exclude k2lab/_modidx.py k2lab
	$(BIN)/ruff format --check nbs tests $(PLAIN)
	$(BIN)/pyright

notebooks: $(TESTED)
	@$(ASIDE) && $(BIN)/python tests/notebooks.py --workers $(WORKERS) --write
	$(BIN)/nbdev-clean

test-faults: $(TESTED)
	K2LAB_FAULTS=full $(BIN)/python -m pytest -q -s tests/test_faults.py tests/test_guard.py tests/test_resume.py tests/test_distributed.py tests/test_certificate.py tests/test_templates.py

lab: $(READY)
	$(BIN)/nbdev-install-hooks
	$(BIN)/jupyter lab --ip 127.0.0.1 $(if $(filter 0,$(shell id -u)),--allow-root) nbs

export: $(READY)
	$(BIN)/nbdev-export
	$(BIN)/python tests/readme.py --write

clean-runs:
	rm -rf runs/scratch
