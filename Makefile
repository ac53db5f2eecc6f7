# make demo    merge real models and see what it brings
# make test    all checks: tests, lint, format, types, layers
# make bench   measure it beside other tools: docs/benchmarks (hours; BENCH_OPTIONS for less)
# All install what they need into .venv, with nothing but Python and make on the machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_STAMP := $(VENV)/.installed-demo
DEV_STAMP := $(VENV)/.installed-dev
BENCH_STAMP := $(VENV)/.installed-bench
BENCH_WORK_DIR ?= bench-output
BENCH_OPTIONS ?=

.PHONY: demo test bench lint format docs clean

demo: $(DEMO_STAMP)
	$(BIN)/python -m docs.examples.demo

test: $(DEV_STAMP) lint
	$(BIN)/python -m pytest -q

bench: $(BENCH_STAMP)
	$(BIN)/python -m benchmarks.compare --work-dir $(BENCH_WORK_DIR) --keep $(BENCH_OPTIONS)

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DEV_STAMP)
	$(BIN)/python -m tests.generators.cli_reference > docs/cli.md

$(DEMO_STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[demo]'
	touch $@

$(DEV_STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

$(BENCH_STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) demo-output study-output bench-output .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
