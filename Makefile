# Every command of the project. `make demo` and `make test` work alone on a fresh checkout: they make .venv,
# install the versions of requirements/constraints.txt, build the extension and run.
#
#   make test PYTHON=python3.12     another interpreter (before .venv exists)
#   make test WORKERS=8             more test processes
#
# Nothing outside this folder is touched. Stamp files under .venv remember what is done.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV := .venv
WORKERS ?= 2
BIN := $(VENV)/bin
RUN := $(BIN)/python
CMAKE := $(BIN)/cmake
SANITIZE_DIR := build/sanitize

STAMP_VENV := $(VENV)/.stamp-venv
STAMP_TOOLS := $(VENV)/.stamp-tools
STAMP_PACKAGE := $(VENV)/.stamp-package

# Folders are listed too, so that a deleted file counts as a change.
CPP_SOURCES := $(shell find csrc tests/cpp -name '*.cc' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PACKAGE_SOURCES := CMakeLists.txt pyproject.toml LICENSE NOTICE README.md $(shell find cmake csrc) \
  $(shell find python -name '*.py' -o -name '*.pyi' -o -name '*.typed' -o -name '*.json')

# One test process per core, each with one thread, is quicker than the reverse.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help demo ablation vision test test-cpu test-slow lint format bench bench-cpu bench-peers sanitize docs clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

demo: $(STAMP_PACKAGE) ## quantize the small model, generate text, compare speed and perplexity with float
	$(RUN) -m bench.demo

ablation: $(STAMP_PACKAGE) ## what each part of the method is worth, at 8, 6 and 4 bits (about ten minutes)
	@mkdir -p bench-output
	$(RUN) -m bench.ablation --json bench-output/ablation.json

vision: $(STAMP_PACKAGE) ## the small vision model quantized in every way: accuracy, agreement, speed (about twenty minutes)
	@mkdir -p bench-output
	$(RUN) -m bench.vision --json bench-output/vision.json

test: lint sanitize test-cpu test-cuda ## all that runs without a GPU: lint, sanitizers, CPU tests, the CUDA backend

test-cpu: $(STAMP_PACKAGE) ## fast test tier on the CPU
	$(ONE_THREAD) $(RUN) -m pytest -q -n $(WORKERS) -m "not slow"

test-slow: $(STAMP_PACKAGE) ## the sweeps that the fast tier leaves out
	$(ONE_THREAD) $(RUN) -m pytest -q -n $(WORKERS) -m slow

lint: $(STAMP_TOOLS) ## ruff, mypy, clang-format, import contract
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)
	@$(BIN)/mypy --no-error-summary
	@PYTHONPATH=python $(BIN)/lint-imports > $(VENV)/lint-imports.log \
	  || { cat $(VENV)/lint-imports.log; exit 1; }
	@echo "lint: ruff, clang-format, mypy and the import contract pass"

format: $(STAMP_TOOLS) ## rewrite the sources in the project's format
	$(BIN)/ruff check --quiet --fix .
	$(BIN)/ruff format --quiet .
	$(BIN)/clang-format -i $(CPP_SOURCES)

bench: $(STAMP_PACKAGE) ## time every operator against the machine's roofs
	$(RUN) -m bench.run

# BENCH=quick: eight minutes; BENCH="full --size mamba-130m": what `python -m bench.cpu --help` lists.
bench-cpu: $(STAMP_PACKAGE) ## whole models and kernels beside the peers that are installed: bench-output/cpu-*
	$(RUN) -m bench.cpu $(BENCH)

bench-peers: $(STAMP_TOOLS) ## install the peers of bench-cpu: builds llama.cpp for this processor, some minutes
	PATH="$(CURDIR)/$(BIN):$$PATH" CMAKE_ARGS="-DGGML_NATIVE=ON" $(RUN) -m pip install -qq \
	  --disable-pip-version-check --no-deps -r requirements/bench.txt

sanitize: $(STAMP_TOOLS) ## C++ tests of the kernels under AddressSanitizer and UBSan
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(CMAKE) -S . -B $(SANITIZE_DIR) -G Ninja --log-level=WARNING \
	  -DCMAKE_COMPILE_WARNING_AS_ERROR=ON -DMBQ_BUILD_PYTHON=OFF -DMBQ_BUILD_CPP_TESTS=ON -DMBQ_SANITIZE=address,undefined
	@$(CMAKE) --build $(SANITIZE_DIR) -- --quiet
	@$(BIN)/ctest --test-dir $(SANITIZE_DIR) --output-on-failure --no-tests=error --quiet \
	  && echo "C++ tests passed under AddressSanitizer and UndefinedBehaviorSanitizer"

include cuda.mk

docs: $(STAMP_PACKAGE) ## rewrite docs/ops.md, and what is generated of docs/vision.md and README.md
	$(RUN) scripts/gen_docs.py
	$(RUN) -m scripts.gen_vision
	$(RUN) -m scripts.gen_readme

include gpu.mk

clean: ## remove .venv, build and every cache
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP_VENV):
	@scripts/check_prerequisites.sh "$(PYTHON)"
	@echo "making $(VENV)"
	@"$(PYTHON)" -m venv --clear $(VENV)
	@touch $@

$(STAMP_TOOLS): $(STAMP_VENV) requirements/constraints.txt
	@echo "installing the pinned versions of requirements/constraints.txt (torch is large)"
	@$(RUN) -m pip install -qq --disable-pip-version-check -r requirements/constraints.txt
	@touch $@

$(STAMP_PACKAGE): $(STAMP_TOOLS) $(PACKAGE_SOURCES)
	@scripts/check_prerequisites.sh "$(RUN)"
	@echo "building the extension (a few minutes the first time)"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(RUN) -m pip install -qq --disable-pip-version-check \
	  --no-build-isolation --no-deps --force-reinstall .
	@touch $@
