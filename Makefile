VENV ?= .venv
PYTHON ?= python3
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread in each test worker: small networks gain nothing from more, and bit-for-bit tests want a fixed number.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint docs bench clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-10s %s\n", $$1, $$2 }'

$(STAMP): pyproject.toml constraints.txt
	@echo "setting up $(VENV): some minutes, the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP) ## the main job on two real data sets: tables, certificates, pictures
	$(BIN)/python examples/demo.py

test: $(STAMP) ## the fast tests
	$(PYTEST) -m "not slow"

test-slow: $(STAMP) ## the slow tests
	$(PYTEST) -m slow

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP) ## the documentation site, into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: $(STAMP) ## the benchmarks
	@for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean: ## remove everything that make made
	rm -rf $(VENV) site results build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
