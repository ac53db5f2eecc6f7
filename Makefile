# make demo      merge real models and see what it brings
# make check     within a minute: lint, format, types, layers, tests of the packages that you changed
# make test      all checks: tests (of long campaigns a sample), lint, format, types, layers
# make campaign  the long campaigns whole: every case, fault and tie, and the fuzzer (hours)
# make bench     measure it beside other tools: docs/benchmarks (hours; BENCH_OPTIONS for less)
# All install what they need into .venv, with nothing but Python and make on the machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_STAMP := $(VENV)/.installed-demo
DEV_STAMP := $(VENV)/.installed-dev
CAMPAIGN_STAMP := $(VENV)/.installed-campaign
BENCH_STAMP := $(VENV)/.installed-bench
BENCH_WORK_DIR ?= bench-output
BENCH_OPTIONS ?=
# A process for each core; tests/conftest.py says which tests stay together, and which come first.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder
PYTEST_OPTIONS ?=
FUZZ_TARGETS := header tensors file index recipe config modules tokenizer examples
FUZZ_SECONDS ?= 600

.PHONY: demo check test campaign bench lint format docs clean

demo: $(DEMO_STAMP)
	$(BIN)/python -m docs.examples.demo

check: $(DEV_STAMP) lint
	@paths=$$($(BIN)/python -m tests.support.changed) && \
	if [ -n "$$paths" ]; then $(PYTEST) $(PYTEST_OPTIONS) $$paths; else echo "no tests to run"; fi

test: $(DEV_STAMP) lint
	$(PYTEST) $(PYTEST_OPTIONS)

campaign: $(CAMPAIGN_STAMP)
	$(PYTEST) --campaign $(PYTEST_OPTIONS)
	$(BIN)/python -m tests.faults.campaign all
	for target in $(FUZZ_TARGETS); do \
	$(BIN)/python -m tests.hostile.fuzz $$target --seconds $(FUZZ_SECONDS) || exit 1; done

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

$(CAMPAIGN_STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[campaign]'
	touch $@

$(BENCH_STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) demo-output study-output bench-output .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
