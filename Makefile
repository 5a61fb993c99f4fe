# Common tasks. Each target first installs the project with its development tools in .venv, except gpu-check and clean.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= build/gpu-check

.PHONY: install demo notebook test test-slow test-reliability check format docs kernel-hub gpu-check clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py pyproject.toml
	@echo "Installing fasttrain and its development tools in $(VENV). This takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar off --disable-pip-version-check --editable ".[dev]"
	touch $@

# WEIGHTS=timm://vit_small_patch14_dinov2.lvd142m uses that encoder instead of the small one in the package.
demo: install
	$(BIN)/python -m fasttrain demo $(if $(WEIGHTS),backbone.weights=$(WEIGHTS) output=runs/$(basename $(notdir $(WEIGHTS))))
	@echo "These commands need the environment: source $(VENV)/bin/activate"

# Run the notebook in build/notebook. It is stored there with its outputs; the one in examples/ has none.
notebook: install
	rm -rf build/notebook && mkdir -p build/notebook && cp examples/quickstart.ipynb build/notebook
	$(BIN)/jupyter execute --inplace build/notebook/quickstart.ipynb

# One single-threaded process per core, because most tests are too small to use several threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

test: install
	$(PYTEST) -m "not slow"

# The tests that `make test` omits.
test-slow: install
	$(PYTEST) -m slow

# Kill, starve and feed fasttrain until a promise breaks; about 40 minutes on two cores. See tests/reliability/__main__.py.
test-reliability: install
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m reliability $(PARTS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Build the documentation in build/site. Broken links and undocumented parameters are errors.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# Lay the kernels out in build/kernel-hub, for the Hugging Face kernel hub.
kernel-hub: install
	rm -rf build/kernel-hub
	$(BIN)/python kernels/hub/layout.py build/kernel-hub

# Run the GPU tests and benchmarks with an interpreter that has torch (PYTHON), without installing anything. STEPS names
# some steps, or parts of less than 9.5 minutes: 1, 2 or 3. See benchmarks/gpu_check.py.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(OUT) $(STEPS)

clean:
	rm -rf $(VENV) build *.egg-info
