# One environment, .venv, made on first use; every target brings what it needs.
#   make demo [ARGS="--steps 100"]    make test    make compat    make lint    make report    make docs    make clean
#   make peers    make bench [ARGS="-k attention"]    make wheel [CUDA=13.0] [WITH="python3.10=2.10.0 ..."]
PYTHON ?= python3
TORCH ?= 2.13.0
CXX ?= g++
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') setup.py pyproject.toml
HAS_CXX := $(shell command -v $(firstword $(CXX)) >/dev/null 2>&1 && echo 1)

# A suite that skips the compiled backend because its build broke would be green for the wrong reason.
export FASTGRU_REQUIRE_EXTENSION ?= $(HAS_CXX)
export CXX

.PHONY: demo test compat lint peers bench report docs wheel setup clean

demo: setup
	$(BIN)/python -m fastgru demo $(ARGS)

# Each worker keeps torch to one thread; the tests of threading ask for more.
test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# Runs the features on torch.nn as well and writes what it saw.
compat: setup
	$(BIN)/python -m pytest -n 2 -m feature --feature-tables=docs $(ARGS)

# What `make bench` and benchmarks/cpu_gru.py compare with, beside torch.
peers: $(STAMPS)/peers

# Half a second for each row, so that all of them take minutes; what ARGS say counts more.
bench: setup
	mkdir -p build
	$(BIN)/python -m pytest benchmarks -rs --benchmark-max-time=0.5 --benchmark-columns=median,iqr,max,rounds \
		--benchmark-json=build/benchmarks.json $(ARGS)
	$(BIN)/python benchmarks/report.py --show build/benchmarks.json --page build/benchmarks.html

# Also brings the blocks and pictures of README.md and docs/ up to date.
report: setup
	$(BIN)/python benchmarks/report.py

docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: setup
	find benchmarks -name '*.cpp' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(BIN)/clang-format --dry-run --Werror
	$(BIN)/lint-imports
	$(BIN)/mypy

# The checks are checked first. Into a folder of its own, so that what is checked is what was built.
wheel: $(STAMPS)/wheel
	$(BIN)/python -m pytest --quiet tests/test_check_wheel.py
	rm -rf build/wheel
	$(BIN)/python tools/build_wheel.py $(if $(CUDA),--cuda $(CUDA)) --out build/wheel
	$(BIN)/python tools/check_wheel.py build/wheel/*.whl $(if $(WITH),--with $(WITH))
	mkdir -p dist
	cp build/wheel/* dist/

setup: $(STAMPS)/installed

$(STAMPS)/wheel $(STAMPS)/docs $(STAMPS)/peers: $(STAMPS)/installed
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[$(@F)]"
	touch $@

# The name carries the version: another TORCH installs anew.
$(STAMPS)/torch-$(TORCH):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	rm -f $(STAMPS)/torch-*
	$(BIN)/python -c 'import torch, sys; sys.exit(torch.__version__.split("+")[0] != "$(TORCH)")' 2>/dev/null \
		|| $(BIN)/python -m pip install --upgrade "setuptools>=77" "torch==$(TORCH)"
	touch $@

$(STAMPS)/installed: $(STAMPS)/torch-$(TORCH) $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist site runs benchmarks/build tests/whitebox/build fastgru/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
