# Every target sets up what it needs: a virtual environment in .venv, the rest in build/.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.NOTPARALLEL:  # targets share build/release; cmake --build runs the compilers in parallel

PYTHON ?= python3
JOBS ?= $(shell nproc)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
unexport FLASH_ATTN_LIBRARY_DIR PYTHONPATH
# Every machine builds and tests the CUDA kernels of the same nvcc, the one in .venv. After `make clean`,
# `make test FLASH_ATTN_CUDA=AUTO` takes the one on PATH, OFF goes without. pip reads it from the environment.
export FLASH_ATTN_CUDA := PYPI

SOURCES := $(shell find csrc cmake emulator examples/cpp tests/cpp flash_attn -name __pycache__ -prune -o -type f -print) \
  CMakeLists.txt pyproject.toml flash_attn_2_cuda.py
CPP_FILES = $(shell find csrc benchmarks emulator examples tests -regex '.*\.\(h\|cpp\|cu\|inc\)')
# Of CUTLASS only the headers are used, by tests of the emulated GPU.
CUTLASS := 4.2.0.0
CMAKE_FLAGS := -G Ninja -DPython_EXECUTABLE=$(CURDIR)/.venv/bin/python -DFLASH_ATTN_CUDA=$(FLASH_ATTN_CUDA) \
  -DFLASH_ATTN_SOFTWARE_ISAS=ON

VENV := .venv/.complete
LIBRARIES := build/.libraries
RELEASE := build/.release
INSTALLED := build/.installed

.PHONY: help dev demo test bench lint format asan tsan wheel clean
help: ## print this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/\1\t\2/' | expand -t 10

$(VENV): tools/constraints-dev.txt tools/install_system_packages.sh
	PYTHON=$(PYTHON) tools/install_system_packages.sh
	$(PYTHON) -m venv .venv
	@echo 'installing tools/constraints-dev.txt into .venv (a minute or two)'
	.venv/bin/pip install -qq --disable-pip-version-check -r tools/constraints-dev.txt
	.venv/bin/pip install -qq --disable-pip-version-check --no-deps nvidia-cutlass==$(CUTLASS)
	touch $@

# What the Python package holds: the library and the emulated GPU.
$(LIBRARIES): $(VENV) $(SOURCES)
	cmake -S . -B build/release $(CMAKE_FLAGS) -DFLASH_ATTN_WERROR=ON
	cmake --build build/release -j $(JOBS) --target flash_attn_ffi
	touch $@

# All of it, the C++ tests too.
$(RELEASE): $(LIBRARIES)
	cmake --build build/release -j $(JOBS)
	touch $@

# pip takes over the objects of build/release, so nothing is compiled twice.
$(INSTALLED): $(LIBRARIES)
	pip install -qq --disable-pip-version-check --no-build-isolation --no-deps --config-settings=build-dir=build/release .
	touch $@

dev: $(LIBRARIES) ## build, to work on the Python files in place
	@echo 'export PATH=$(CURDIR)/.venv/bin:$$PATH PYTHONPATH=$(CURDIR) FLASH_ATTN_LIBRARY_DIR=$(CURDIR)/build/release/lib'

demo: $(INSTALLED) ## train a small GPT, generate text with it, compare speed and memory (build/demo)
	mkdir -p build/demo
	.venv/bin/python examples/train_text.py

# Tests share the cores by processes: threads that wait must not take time from those of others. The CUDA kernels' tests
# load a driver and run its threads: in processes of their own, in which torch needs one thread. worksteal leaves
# neighbours to one process, so that what a module prepares is seldom prepared twice; the longest tests come first.
PYTEST := pytest --config-file=../pyproject.toml -n $(JOBS) --maxprocesses=8 --dist worksteal
test: $(RELEASE) $(INSTALLED) ## C++ tests, then Python tests of the installed package
	OMP_WAIT_POLICY=passive ctest --test-dir build/release --output-on-failure -j $(JOBS)
	cd build && OMP_WAIT_POLICY=passive $(PYTEST) ../tests/python --ignore-glob='../tests/python/test_cuda*.py'
	cd build && OMP_NUM_THREADS=1 $(PYTEST) ../emulator/tests/mutation ../tests/python/test_cuda*.py

bench: $(INSTALLED) ## time attention against PyTorch and the machine's limits (build/bench)
	.venv/bin/python benchmarks/benchmark_attn.py --quick

lint: $(RELEASE) ## formatting, ruff, layers, and a build without compiler warnings
	clang-format --dry-run --Werror $(CPP_FILES)
	ruff format --check .
	ruff check .
	.venv/bin/python tools/check_includes.py

format: $(VENV) ## format all C++ and Python files
	clang-format -i $(CPP_FILES)
	ruff format .
	ruff check --fix .

asan: SANITIZE := address,undefined
asan: $(LIBRARIES) ## C++ tests under the address and undefined behaviour sanitizers
tsan: SANITIZE := thread
tsan: $(LIBRARIES) ## C++ tests under the thread sanitizer
asan tsan: # the CUDA kernels are those of build/release: nothing sanitizes them
	cmake -S . -B build/$@ $(CMAKE_FLAGS) -DCMAKE_BUILD_TYPE=Debug -DFLASH_ATTN_PYTHON=OFF -DFLASH_ATTN_RUNNABLE_ISAS=ON \
	  -DFLASH_ATTN_FATBINS=$(CURDIR)/build/release/cuda \
	  -DFLASH_ATTN_SANITIZE=$(SANITIZE) $(SANITIZE_FLAGS)
	cmake --build build/$@ -j $(JOBS)
	OMP_WAIT_POLICY=passive UBSAN_OPTIONS=print_stacktrace=1 ctest --test-dir build/$@ --output-on-failure -j $(JOBS)

wheel: $(VENV) ## build the wheel as users do, isolated from everything, and check it
	tools/check_wheel.sh

clean: ## remove everything that was built, .venv too
	rm -rf build .venv .ruff_cache .hypothesis
