# make demo   quantize SmolLM2-135M to 3 bits by several methods, measure, generate
# make test       lint, types, architecture, tests in a few minutes
# make test-all   the same with every combination of members, and coverage
# make test-gpu   test and time the Triton kernels, where there is a GPU
# make mutants    break 40 lines, drawn by SEED, and count those that the tests notice
# make fuzz   damage files for MINUTES, drawn by SEED, and read them in every way
# make kill       kill commands at 200 moments, drawn by SEED, and compare what they leave
# make docs   the site, in site/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Pinned, so that everyone tests the same. Where pip knows an index of CPU builds it takes one; from plain PyPI
# on Linux this torch brings CUDA along, which works as well and is only larger.
TORCH ?= torch==2.13.0

.PHONY: setup demo test test-all test-gpu pytest pytest-all mutants fuzz kill lint style types imports browser sanitize docs clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

demo: setup
	$(BIN)/python examples/demo.py

lint: style types imports

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

# Waiting threads sleep: on a machine with other work, spinning ones take the cores from the threads that they wait for.
# One process per core, up to four, each with one thread.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

# Types take a minute of one core, so they are checked while the tests run.
test test-all: setup
	@$(MAKE) --no-print-directory --jobs=2 style imports browser
	@$(MAKE) --no-print-directory --jobs=2 types py$@

pytest: setup
	$(PYTEST)

pytest-all: setup
	BITMILL_FULL_TESTS=1 $(PYTEST) --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

# The tests that others run in Triton's interpreter, and times as shares of the memory's bandwidth; under 5 minutes.
test-gpu: setup
	PYTHONPATH=tests $(BIN)/python tests/gpu.py

SEED ?= 0
mutants: setup
	$(BIN)/python tests/mutants.py --seed $(SEED)

MINUTES ?= 10
fuzz: setup
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m fuzz --minutes $(MINUTES) --seed $(SEED)

# Commands killed at random moments leave the old bytes or, when they have gone on, those of an undisturbed run.
MOMENTS ?= 200
kill: setup
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python tests/kill.py --seed $(SEED) --moments $(MOMENTS)

# Pages are tested in a Chromium. Where it is missing it is installed, if this is root on a Debian; otherwise
# the tests that want one are skipped, and say so.
browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
	  command -v $$name > /dev/null && exit 0; \
	done; \
	[ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null || exit 0; \
	{ apt-get update && apt-get install -y --no-install-recommends chromium; } > /dev/null 2>&1 \
	  || echo "chromium could not be installed; tests/browser will be skipped"

# The compiled kernels against plain loops, under the address and undefined behaviour sanitizers; KERNELS="step kv": those.
KERNELS ?=
sanitize:
	csrc/tests/sanitize.sh $(KERNELS)

docs: setup
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build dist site demo-output src/bitmill/_native*.so
