# `make help` lists the targets; each sets up .venv first if it must.
# QUICK=tests/selection names what `make quick` tests; all by default.
# PYTHON=python3.12 picks another interpreter; PIP_FLAGS is handed to pip, for instance to name
# the package index of a CPU-only or another CUDA build of torch.

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
PIP_FLAGS ?=
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := runs/demo-outliers
QUICK ?=

# Bytecode is kept even where an environment says not to: dozens of tests start processes that import all of it.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
FUZZ := 600

.PHONY: help demo quick test fuzz versions lint browser figures notebooks clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

# One thread: the embedded models are tiny, and threads only wait for each other where cores are shared. Fewer scenes
# than by default: many CPUs emulate bf16.
demo: export OMP_NUM_THREADS = 1
demo: $(STAMP)  ## scan, rank, compare and report an embedded model: runs/demo-outliers
	$(BIN)/qprobe doctor
	$(BIN)/qprobe scan --model demo-outliers --samples 32 --out $(DEMO)
	$(BIN)/qprobe rank $(DEMO)
	$(BIN)/qprobe compare --manifest $(DEMO)/skiplist.json --samples 48
	$(BIN)/qprobe report $(DEMO)

# One process per core and no more: each imports torch and transformers, 10 s of work.
quick: $(STAMP)  ## after each edit, within a minute: lint, types of changed files, the fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	@changed=$$(git diff --name-only --diff-filter=d HEAD -- 'qprobe/*.py'; \
		git ls-files --others --exclude-standard -- 'qprobe/*.py'); \
		test -z "$$changed" || $(BIN)/pyright $$changed
	$(PYTEST) -n auto --maxprocesses 8 -m "not slow" $(QUICK)

# Three workers of one thread each, since some wait for processes that they started; the models are tiny, and
# threads would only get in each other's way.
test: lint browser  ## lint and all tests
	$(PYTEST) -n 3

fuzz: $(STAMP)  ## damaged and hostile inputs for every reader; FUZZ=60 for a minute
	$(BIN)/python -m tests.fuzz $(FUZZ)

versions: $(STAMP)  ## all tests on the lowest and the newest transformers, peft and bitsandbytes that are allowed
	PIP_FLAGS="$(PIP_FLAGS)" $(BIN)/python -m tests.versions -n 3 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)  ## format, lint, types, and who imports whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# The tests of the report page drive a real browser. Root on Debian gets one; elsewhere those tests are skipped,
# except in CI (CI is set), where a missing browser fails.
browser:  ## Chromium for the tests of the report page, where this may be installed
	@command -v chromium chromium-browser google-chrome >/dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			chromium fonts-dejavu-core; } || { \
		test -z "$$CI" && echo "No chromium: the tests of the report page will be skipped."; }

figures: export OMP_NUM_THREADS = 1
figures: $(STAMP)  ## every picture in README.md and reports/, from nothing
	rm -rf runs/demo runs/demo-outliers
	for model in demo demo-outliers; do \
		$(BIN)/qprobe scan --model $$model --out runs/$$model && \
		$(BIN)/qprobe compare --manifest runs/$$model/skiplist.json && \
		$(BIN)/qprobe report runs/$$model --out reports/$$model || exit 1; done

notebooks: $(STAMP)  ## run the notebooks and store what they show
	$(BIN)/python -m tests.notebooks

clean:  ## remove the environments, runs and caches
	rm -rf .venv .versions runs dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that the rest can never draw in another build of it.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "qprobe needs Python 3.11 or newer; install one, or name it: make PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo "$(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $(STAMP)
