# Every target does its own set-up: a virtual environment in .venv, torch, the compiled extension, the data.
# The second time only what changed is done again: .make/ holds a stamp for each finished step.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

PYTHON ?= python3
# One known version for everybody. Where pip would fetch CUDA libraries that you do not want, name an index of CPU
# builds: make demo TORCH="torch==2.13.0 --index-url URL"
TORCH ?= torch==2.13.0
# What `make wheel-check` installs the wheel beside, for example TORCH_VERSIONS="2.10.0 2.13.0"
TORCH_VERSIONS ?= 2.13.0
# Extra words for pytest: make test PYTEST_ARGS="-x -k pool"
PYTEST_ARGS ?=
# make bench BENCH_ARGS= measures every layer, which takes half an hour.
BENCH_ARGS ?= --quick
# make gpu-check PYTHON=python3 OUT=DIR GPU_CHECK=tests,bench GPU_CHECK_ARGS="--dtypes float16,float32 --minutes 10"
OUT ?= out/gpu_check
GPU_CHECK ?= tests,sanitize,bench
GPU_CHECK_ARGS ?=

VENV := .venv/bin
STAMP := .make
RUN := $(VENV)/python
CPP_SOURCES = $(shell find csrc tests -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")
SANITIZED := build/sanitized
# Each of the compiler's parts is a package of its own, and they must be of one release.
CUDA_PACKAGES := $(foreach part,cuda-nvcc nvvm cuda-crt cuda-runtime cuda-cccl,"nvidia-$(part)==13.0.*")
# Objects are kept under build/, where ninja finds what an edit touches. It prints whole command lines: the file's name
# is enough, and warnings and errors pass as they are.
BUILD = $(RUN) setup.py --quiet build_ext --inplace | $(SHORT)
SHORT := sed -uE 's|^(\[[0-9]+/[0-9]+\]) .* -c [^ ]*/(csrc/[^ ]+) -o .*|\1 \2|; /^g\+\+ .* -shared /d'

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench emulate emulated lint format cuda gpu-check sanitize wheel-check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(STAMP)/build $(STAMP)/data  ## everything the other targets need (bench brings the other runtimes itself)

demo: $(STAMP)/build $(STAMP)/data  ## train LeNet-5 on real digits with fastconv and with torch.nn, side by side
	$(RUN) examples/train_lenet.py

# The report fails the run if a CUDA kernel was never called, so it is for the whole suite only.
test: $(STAMP)/build $(STAMP)/data  ## the whole test suite, `make emulate` included
	PYTHONPATH=tests $(RUN) -m pytest -n 2 $(if $(PYTEST_ARGS),,-p emulator_report) $(PYTEST_ARGS)

bench: $(STAMP)/build $(STAMP)/peers  ## the lecture's layers and networks against torch and its rivals, as ratios
	$(RUN) -m pytest benchmarks --benchmark-only $(BENCH_ARGS) $(PYTEST_ARGS)

# MAX_JOBS compilers at once. The Python tests compile the kernels and the emulator themselves, into build/emulator.
emulate: $(STAMP)/build  ## every CUDA kernel on the CPU: results, races, planted bugs; needs no GPU and no CUDA
	PYTHONPATH=tests $(RUN) -m pytest -n 2 -p emulator_report \
	    $(wildcard tests/test_cuda_*.py tests/test_emulat*.py) $(PYTEST_ARGS)

emulated: $(STAMP)/build  ## the library behind FASTCONV_EMULATE=1: CUDA kernels on CPU tensors, for study; KIND=debug for gdb
	$(RUN) tests/emulator_library.py $(KIND)

lint: $(STAMP)/venv  ## ruff, mypy --strict, clang-format; changes nothing
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy
	$(VENV)/clang-format --dry-run --Werror $(CPP_SOURCES)

format: $(STAMP)/venv  ## let the formatters rewrite the files
	$(VENV)/ruff check --fix-only .
	$(VENV)/ruff format .
	$(VENV)/clang-format -i $(CPP_SOURCES)

cuda: $(STAMP)/nvcc  ## compile fastconv/_C_cuda for sm_80 and sm_90a; needs no GPU and fetches nvcc if there is none
	@FASTCONV_CUDA=1 FASTCONV_ONLY=_C_cuda $(BUILD)

# No stamp is asked for: that machine may have no network, so nothing is installed and PYTHON's own torch is used.
gpu-check:  ## on a machine with a GPU: tests, compute-sanitizer, ratios against cuDNN, into OUT; fetches nothing
	@$(PYTHON) -m benchmarks.gpu_check --out $(OUT) --parts $(GPU_CHECK) $(GPU_CHECK_ARGS)

# The instrumented library lives in a tree of its own, beside copies of the Python files and the tests: the one in
# fastconv/ stays as it is. libstdc++ is preloaded as well, because ASan must find its __cxa_throw when it starts. Leaks
# are not looked for: the interpreter and torch never free what lives as long as the process.
sanitize: $(STAMP)/venv  ## the tests marked `sanitize`, with the C++ under ASan and UBSan
	rm -rf $(SANITIZED)/fastconv $(SANITIZED)/tests
	FASTCONV_SANITIZE=address,undefined $(RUN) setup.py --quiet build_py --build-lib $(SANITIZED) \
	    build_ext --build-lib $(SANITIZED) | $(SHORT)
	nm -D $(SANITIZED)/fastconv/_C_cpu*.so | grep __asan_report_load > /dev/null
	cp -r tests pyproject.toml $(SANITIZED)
	cd $(SANITIZED) && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(abspath $(RUN)) -m pytest -m sanitize -p no:cacheprovider $(PYTEST_ARGS)

wheel-check: $(STAMP)/venv  ## build the wheel, install it in fresh environments, one for each of TORCH_VERSIONS
	$(RUN) tests/wheel_check.py $(TORCH_VERSIONS)

clean:  ## remove all that the targets made, .venv included
	rm -rf .venv .make build dist out *.egg-info fastconv/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up -----------------------------------------------------------------------------------------------------------

# Said all at once, before anything is downloaded.
$(STAMP)/machine:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	    echo "fastconv needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	    echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@missing=; \
	command -v $(CXX) >/dev/null || missing="$$missing g++"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	include="$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')"; \
	test -e "$$include/Python.h" || missing="$$missing python3-dev"; \
	if [ -n "$$missing" ]; then \
	    echo "fastconv needs system packages that are not installed. On Debian or Ubuntu:"; \
	    echo "    sudo apt-get install$$missing"; exit 1; \
	fi
	@mkdir -p $(STAMP) && touch $@

# Torch first and alone, so that no other package's requirement picks another build of it. The libraries are built
# before the editable install, which would build them without a word; it then finds nothing left to do.
$(STAMP)/venv: pyproject.toml | $(STAMP)/machine
	@test -x $(RUN) || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing $(TORCH)"
	@$(RUN) -m pip install --quiet $(TORCH)
	@$(RUN) -m pip install --quiet "setuptools>=77" wheel ninja "pybind11>=2.13" numpy
	@echo "compiling the kernels"
	@$(BUILD)
	@echo "installing fastconv and what its tests and checks need"
	@$(RUN) -m pip install --quiet --no-build-isolation --editable ".[test,demo,lint]"
	@touch $@

# Only to compare with, and large: where they cannot be had, the tables say "not installed".
$(STAMP)/peers: $(STAMP)/venv
	@echo "installing what fastconv is compared with"
	@if $(RUN) -m pip install --quiet --no-build-isolation --editable ".[bench]"; then touch $@; \
	else echo "measuring without onnxruntime and openvino"; fi

# The machine's own, or NVIDIA's packages from PyPI.
$(STAMP)/nvcc: $(STAMP)/venv
	@$(RUN) csrc/cuda_support/nvcc.py > /dev/null || { echo "installing nvcc"; $(RUN) -m pip install --quiet $(CUDA_PACKAGES); }
	@$(RUN) csrc/cuda_support/nvcc.py > $@

$(STAMP)/build: setup.py $(CPP_SOURCES) $(STAMP)/venv
	@$(BUILD)
	@touch $@

$(STAMP)/data: examples/mnist.py $(STAMP)/venv
	@$(RUN) examples/mnist.py
	@touch $@
