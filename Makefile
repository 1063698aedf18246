# Short names for what is done often. `make` alone lists them.
PYTHON ?= python
PYTEST_ARGS ?=
# Pure Python all: what pretraining imports, and the libraries that are measured beside ours.
GPU_WHEELS ?= jsonargparse docstring_parser typeshed_client importlib_resources ocnn spconv-triton

.DEFAULT_GOAL := help
.PHONY: help install test test-rest fuzz lint types bench headline gpu-wheels sanitize docs wheel

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## install the package, editable, with all that the tests need
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -e ".[test]"

test: ## the tests that run by default (all kernels, commands and engines, pairs of options)
	$(PYTHON) -m pytest $(PYTEST_ARGS)

test-rest: ## the rest of the exhaustive tests
	$(PYTHON) -m pytest -m rest $(PYTEST_ARGS)

fuzz: ## all attacks of docs/reliability.md: COUNT=10000 inputs or MINUTES=20 of them, KILLS=100; SEED=N draws others
	$(PYTHON) -m tests.fuzz --seed $(or $(SEED),0) \
		$(if $(MINUTES),--minutes $(MINUTES),--count $(or $(COUNT),10000))
	$(PYTHON) -m tests.fuzz.differential --seed $(or $(SEED),0) --minutes $(or $(MINUTES),10)
	$(PYTHON) -m tests.fuzz.kills --seed $(or $(SEED),0) --kills $(or $(KILLS),100)

lint: ## ruff: rules and format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: ## pyright
	$(PYTHON) -m pyright

bench: ## all suites of benchmarks/, minutes
	$(PYTHON) -m pytest benchmarks/

headline: ## the ratios of the README alone; JSON=FILE keeps them
	$(PYTHON) -m benchmarks headline $(if $(JSON),--json $(JSON))

gpu-wheels: ## collect in build/wheels what a GPU machine without a network may lack, for python -m benchmarks gpu --wheels
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest build/wheels \
		$(GPU_WHEELS)

sanitize: ## the tests of the C++ engine under address and undefined-behaviour sanitizers
	scripts/sanitize.sh

docs: ## write again what is generated: tables and figures of the measurements, the figure of the layout
	$(PYTHON) -m benchmarks report
	$(PYTHON) docs/figures/packed_layout.py

wheel: ## build dist/*.whl
	$(PYTHON) -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .
