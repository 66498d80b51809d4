# The one entry for people and for continuous integration. Every target makes .venv by itself and reuses it;
# `make demo PYTHON=python3.12` picks another interpreter for it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
RUNTIME := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
BENCHMARKS := $(wildcard benchmarks/*.py)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check bench docs fmt notebooks clean

help: ## this list
	@awk -F ': .*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(RUNTIME) ## the whole story on the reference pipeline, offline
	$(BIN)/fewstep demo

test: $(DEV) ## quick tests, under three minutes
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not slow" -q

check: $(DEV) ## lint, format, imports, file sizes, types, quick tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(PY) tools/check_sizes.py
	$(BIN)/mypy
	$(MAKE) test

bench: $(DEV) ## every script in benchmarks/
	@for script in $(BENCHMARKS); do echo "$$script" && $(PY) "$$script" || exit 1; done

docs: $(DEV) ## build the documentation
	$(PY) docs/build.py

fmt: $(DEV) ## fix what can be fixed by itself, and format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

notebooks: $(DEV) ## execute every notebook; nothing is written back
	$(if $(NOTEBOOKS),$(BIN)/jupyter-execute --kernel_name=python3 --timeout=900 $(NOTEBOOKS),@echo "no notebooks")

clean: ## remove caches and build results; .venv and runs/ stay
	rm -rf build dist site demo-output .pytest_cache .hypothesis .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

$(PY):
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install -c constraints.txt -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install -c constraints.txt -e ".[dev]"
	@touch $(RUNTIME) $@
