# `make demo` and `make test` are the two commands; each sets up .venv first if it must.
# PYTHON=python3.12 picks another interpreter; PIP_FLAGS is handed to pip, for instance to name
# the package index of a CPU-only or another CUDA build of torch.

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
PIP_FLAGS ?=
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := runs/demo-outliers
FIGURES := reports/demo-outliers

.PHONY: demo test lint figures clean

# One thread: the embedded models are tiny, and threads only wait for each other where cores are shared.
demo: export OMP_NUM_THREADS = 1
demo: $(STAMP)
	$(BIN)/qprobe doctor
	$(BIN)/qprobe scan --model demo-outliers --out $(DEMO)
	$(BIN)/qprobe rank $(DEMO)
	$(BIN)/qprobe compare --manifest $(DEMO)/skiplist.json
	$(BIN)/qprobe report $(DEMO)

# Two workers of one thread each: the models are tiny, and threads would only get in each other's way.
test: lint
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# The picture in README.md, from nothing.
figures: $(STAMP)
	rm -rf $(DEMO)
	$(BIN)/qprobe scan --model demo-outliers --out $(DEMO)
	$(BIN)/qprobe report $(DEMO) --out $(FIGURES)

clean:
	rm -rf .venv runs dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that the rest can never draw in another build of it.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "qprobe needs Python 3.11 or newer; install one, or name it: make PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo "$(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $(STAMP)
