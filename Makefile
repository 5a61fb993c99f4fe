# The whole project from one shell: `make demo` shows it, `make test` proves it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= benchmarks/results

.PHONY: install demo test test-slow check format docs gpu-check clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/python -m fasttrain demo

# A process a core, each with one thread: most tests are too small for more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

test: install
	$(PYTEST) -m "not slow"

# Only what `make test` leaves out.
test-slow: install
	$(PYTEST) -m slow

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in build/site; a broken link or an undocumented parameter is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# Installs nothing: PYTHON is an interpreter that has torch; parts that need more are reported and skipped.
gpu-check:
	sh benchmarks/gpu_check.sh $(PYTHON) $(OUT)

clean:
	rm -rf $(VENV) build *.egg-info
