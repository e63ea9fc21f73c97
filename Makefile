# `make help` lists the targets. Each one sets up .venv first, so it may be the only command typed in a fresh clone.
PYTHON ?= python3
# What pip installs as torch on a machine without a GPU; options may follow, such as `torch==2.13.0 --index-url URL`.
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Threads spin only briefly while they wait: nearly as fast on a quiet machine, several times faster on a busy one.
export GOMP_SPINCOUNT ?= 10000

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo browser test quality bench docs clean

help: ## List the targets
	@echo "make TARGET [PYTHON=python3.12] [TORCH='torch==2.13.0']"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

install: $(STAMP) ## Make .venv with everything for development

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "peft-autoqra needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
		     "Name another one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	command -v nvidia-smi >/dev/null || $(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## Search, fine-tune and compare on SmolLM2-135M (ARGS='--help' for options)
	$(BIN)/python scripts/demo.py $(ARGS)

# A browser that cannot be had skips its tests and nothing else.
browser:
	@{ command -v chromium && command -v chromedriver; } >/dev/null || { \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends \
			chromium chromium-driver fonts-dejavu-core >/dev/null; } || \
		echo "There is no chromium with chromedriver: the tests that open a report in a browser will be skipped."

test: $(STAMP) browser ## Run the tests, without those marked slow, gpu or hub (ARGS='-m slow' for others)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

quality: $(STAMP) ## Run ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) ## Run scripts/benchmark_*.py
	@set -e; for script in $(sort $(wildcard scripts/benchmark_*.py)); do \
		echo "== $$script"; $(BIN)/python $$script $(ARGS); done

docs: $(STAMP) ## Build the API reference from the docstrings, into docs/api
	$(BIN)/python scripts/build_api_docs.py $(ARGS)

clean: ## Remove .venv, caches and build output
	rm -rf $(VENV) build dist docs/api .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find peft_autoqra tests scripts examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
