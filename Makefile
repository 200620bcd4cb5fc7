# make demo   quantize SmolLM2-135M to 3 bits by several methods, measure, generate
# make test   lint, types, architecture, tests
# make docs   the site, in site/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Pinned, so that everyone tests the same. Where pip knows an index of CPU builds it takes one; from plain PyPI
# on Linux this torch brings CUDA along, which works as well and is only larger.
TORCH ?= torch==2.13.0

.PHONY: setup demo test lint docs clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

demo: setup
	$(BIN)/python examples/demo.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

docs: setup
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build dist site demo-output
