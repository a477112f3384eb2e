# Two commands are enough on a machine with Python 3.11+, its venv and pip: `make train` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# one rank a GPU: a machine with a single one trains on one rank, any other on two
NPROC ?= $(if $(filter 1,$(shell nvidia-smi -L 2>/dev/null | head -n 2 | wc -l)),1,2)
# a GPU machine takes the CUDA build of fbgemm-gpu, any other the CPU build under the same name
EXTRA ?= $(if $(shell command -v nvidia-smi),cuda,cpu)

RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
SOURCES_OF_INSTALL := pyproject.toml hatch_build.py packaging/fbgemm-gpu-shim/pyproject.toml \
	$(wildcard hstu_dist/ops/csrc/*)

# many processes start below, and each would compile all modules anew
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install data train stream-demo results gpu report docs test test-long test-cluster coverage audit faults check format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(STAMP)  ## create the environment in .venv, once

# an environment without pip, or of an older Python, is what an earlier attempt left
$(STAMP): $(SOURCES_OF_INSTALL)
	$(RUN) -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || $(PYTHON) -m venv --clear $(VENV)
ifeq ($(EXTRA),cpu)
	$(RUN) -m pip install --quiet ./packaging/fbgemm-gpu-shim
endif
	$(RUN) -m pip install --quiet --editable '.[$(EXTRA),dev]'
	$(RUN) -m pip check
	touch $(STAMP)

data: $(STAMP)  ## fetch MovieLens-1M and write it as sequences, once
	$(RUN) -m hstu_dist prepare data=ml1m

train: data  ## train HSTU on MovieLens-1M with NPROC ranks, evaluate, print the result table
	$(RUN) -m launch experiment=ml1m cluster=local nproc=$(NPROC)

stream-demo: data  ## play MovieLens-1M as a stream of weeks, predict each week before training on it, plot; minutes
	$(RUN) -m benchmarks.play_stream data/ml1m data/ml1m_weeks
	$(RUN) -m launch experiment=ml1m_stream cluster=local nproc=$(NPROC)

results: data  ## measure what the published MovieLens-1M table at three seeds still lacks, with NPROC ranks, hours; render all tables
	$(RUN) -m benchmarks ml1m --nproc $(NPROC)
	$(RUN) -m hstu_dist report results

gpu: $(STAMP)  ## on a machine with a GPU: its tests, tuned kernels, all benchmarks that depend on it; 20 minutes at most
	$(RUN) -m benchmarks gpu

report: $(STAMP)  ## render README.md's tables, docs/results.md and plots from benchmarks/results
	$(RUN) -m hstu_dist report results

docs: $(STAMP)  ## write docs/reference.md and the pictures of docs/concepts.md from the code
	$(RUN) -m tests.docs.reference
	$(RUN) -m tests.docs.pictures

test: $(STAMP)  ## run the test suite, on two processes
	$(RUN) -m pytest -n 2 --dist worksteal -m "not slurm and not netns and not long"

test-long: $(STAMP)  ## run the campaigns that take minutes each
	$(RUN) -m pytest -m long --timeout=3600

test-cluster: $(STAMP)  ## run the tests on a real Slurm and on two network namespaces; need root, take minutes
	$(RUN) -m pytest -m "(slurm or netns) and not long"

coverage: $(STAMP)  ## run the test suite and say which lines it never reaches, fail below 90%; twice as long
	$(RUN) -m coverage erase
	$(RUN) -m coverage run -m pytest -n 2 --dist worksteal -m "not slurm and not netns and not long" --timeout=900
	$(RUN) -m coverage combine --quiet
	$(RUN) -m coverage report

audit: $(STAMP)  ## look all installed packages up in OSV's list of known vulnerabilities; needs api.osv.dev
	$(RUN) packaging/audit.py

faults: $(STAMP)  ## kill, stop, cut off and mislead small runs at random steps, and check how they end; minutes, as root also on a full disk
	$(RUN) -m benchmarks faults

check: $(STAMP)  ## format, lint, types and the fast tests
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) -m pytest -n 2 --dist worksteal -m "not slow and not distributed and not slurm and not netns and not long"

format: $(STAMP)  ## rewrite the sources in the common format
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:  ## remove the environment; data/ and runs/ stay
	rm -rf $(VENV)
