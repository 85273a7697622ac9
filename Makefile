# From a fresh clone, on a machine with python3 (and its headers), make and gcc:
#
#   make test          build, then every test but the slow ones
#   make benchmark     build, then the quick benchmark and a training run, summed up
#
# VENV=path            a virtual environment of your own; the torch it has is kept
# PYTHON=python3.12    the Python that .venv is made with
# TORCH_SPEC=...       the torch to install where the environment has none
# TORCH_INDEX_URL=...  a package index to look for it in, besides pip's own
# BATCHNORM_EXT_CUDA=0 no CUDA backend; 1: an error where it cannot be built
# MAX_JOBS=N           compile N files at once
# PYTEST_ARGS=...      more arguments for pytest; -n0 among them: all in one process
# V=1                  show what pip and the compiler print
# VERSIONS='...'       the versions of torch that `make versions` tests

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
VENV ?= .venv
# make splits file names at spaces, wherever they stand.
ifneq ($(words $(CURDIR))$(words $(VENV)),11)
$(error make can not work with a path that has a space: $(CURDIR), $(VENV))
endif
override VENV := $(abspath $(VENV))
PY := $(VENV)/bin/python
STAMPS := $(VENV)/.batchnorm_ext
export PATH := $(VENV)/bin:$(PATH)

# PyPI's torch for Linux on x86-64 brings gigabytes of CUDA libraries. Where no NVIDIA driver is
# visible the CPU build is asked for by name, which fails rather than fetch the other one.
TORCH_VERSION := 2.13.0
CUDA_TORCH_VERSION := 2.11.0
HAS_DRIVER := $(wildcard /proc/driver/nvidia/version)$(shell command -v nvidia-smi)
WANTS_CPU := $(if $(HAS_DRIVER),,$(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)))
TORCH_SPEC ?= torch==$(TORCH_VERSION)$(if $(WANTS_CPU),+cpu)
TORCH_INDEX_URL ?=

# Without compiling what is never imported; what is imported is compiled then, and kept.
PIP := $(PY) -m pip --disable-pip-version-check
export PYTHONDONTWRITEBYTECODE :=
# One line instead of what a command prints, unless it fails.
QUIETLY = $(PY) .ci/quietly build/logs/$(1).log
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

comma := ,

.PHONY: help build cuda-environment cuda-install dist test test-slow versions test-emulated emulation emulation-coverage mutants sanitize benchmark \
        benchmark-smoke why-batch-norm lint format typecheck docs nvcc-check gpu-check gpu-check-emulated \
        clean

help:  ## this list
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---- environment -------------------------------------------------------------------------------

# Debian's python3 comes without ensurepip where python3-venv is missing; virtualenv does without.
$(PY):
	@if [ -e '$(VENV)' ]; then echo 'make: $(VENV) is there, but has no bin/python' >&2; exit 1; fi
	@echo 'creating $(VENV)'
	@if ! $(PYTHON) -m venv '$(VENV)' >/dev/null 2>&1; then \
	    rm -rf '$(VENV)' .bootstrap; \
	    echo 'python3 -m venv does not work here, trying virtualenv'; \
	    $(PYTHON) -m pip install --quiet --target .bootstrap virtualenv \
	        && PYTHONPATH=.bootstrap $(PYTHON) -m virtualenv --quiet '$(VENV)' \
	        || { echo 'make: no venv and no virtualenv: apt-get install python3-venv' >&2; exit 1; }; \
	    rm -rf .bootstrap; \
	fi

# numpy, because torch warns at every import without it.
$(STAMPS)/torch: | $(PY)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	@if ! $(PY) -c 'import torch' 2>/dev/null; then \
	    $(call QUIETLY,torch) 'installing $(TORCH_SPEC)' $(PIP) install --no-compile \
	        $(if $(TORCH_INDEX_URL),--extra-index-url '$(TORCH_INDEX_URL)') '$(TORCH_SPEC)' \
	    || { printf '%s\n' '' "make: pip could not install $(TORCH_SPEC). One of these helps:" \
	        '  make ... TORCH_INDEX_URL=<the CPU index named on the PyTorch installation page>' \
	        '  make ... TORCH_SPEC=torch==$(TORCH_VERSION)   (the default build, 3 GB with CUDA)' \
	        '  make ... VENV=<a virtual environment that has torch>' >&2; exit 1; }; \
	fi
	@$(PIP) install --quiet 'setuptools>=77.0.3' ninja numpy
	@$(PY) -c 'import torch; print("torch", torch.__version__, "in $(VENV)")'
	@mkdir -p $(@D) && touch $@

# What an extra in pyproject.toml asks for, without the package itself (which is installed by the build).
define LIST_EXTRA
import sys
try:
    import tomllib
except ModuleNotFoundError:
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
for name in sys.argv[1:]:
    print("\n".join(line for line in extras[name] if not line.startswith("batchnorm_ext")))
endef
export LIST_EXTRA

# A stamp for one or several extras: test+bench.
$(STAMPS)/%: pyproject.toml | $(STAMPS)/torch
	@mkdir -p build/logs && $(PY) -c "$$LIST_EXTRA" $(subst +, ,$*) >build/logs/$*.txt
	@$(call QUIETLY,$*) 'installing packages for: $(subst +,$(comma) ,$*)' \
	    $(PIP) install --no-compile -r build/logs/$*.txt
	@touch $@
.PRECIOUS: $(STAMPS)/%
FOR_DEVELOPERS := $(STAMPS)/test+bench+docs+dev

# ---- build -------------------------------------------------------------------------------------

# One stamp, named after the environment and the backends: a build for another environment is a build
# for another torch.
# Folders are prerequisites too, so that a file that was added or removed counts.
# An editable install: the sources are what is imported, from any folder. It compiles what has changed.
BUILT := build/built-for$(subst /,-,$(VENV))$(BATCHNORM_EXT_CUDA:%=-cuda-%)
$(BUILT): $(wildcard setup*.py) batchnorm_ext/_version.py $(shell find csrc) \
        $(wildcard $(VENV)/lib/python*/site-packages/torch/version.py) | $(STAMPS)/torch
	@rm -f $(@D)/built-for*
	@$(call QUIETLY,build) 'compiling' \
	    $(PIP) install --verbose --no-index --no-deps --no-build-isolation --editable .
	@touch $@
IS_BUILT := $(wildcard batchnorm_ext/_C*.so)
# Which sources are imported, as setuptools writes it: another checkout's may have been installed since.
FINDERS := $(wildcard $(VENV)/lib/python*/site-packages/__editable___batchnorm_ext_*_finder.py)
IS_INSTALLED := $(if $(FINDERS),$(shell grep -lF "'$(CURDIR)/batchnorm_ext'" $(FINDERS)))
ifeq ($(and $(IS_BUILT),$(IS_INSTALLED)),)
.PHONY: $(BUILT)
endif

build: $(BUILT)  ## build the extension in place, and install it (editable)

# Every kernel is compiled for every architecture by nvcc-check; here one is enough, and nothing need be
# fast. No GPU is needed.
NOT_FAST := CXXFLAGS='-O0 -DBATCHNORM_EXT_PORTABLE' NVCC_APPEND_FLAGS=--Ofast-compile=max
cuda-environment cuda-install: TORCH_SPEC = torch==$(CUDA_TORCH_VERSION)
cuda-environment: $(STAMPS)/torch  ## a CUDA build of torch in VENV
cuda-install: $(STAMPS)/torch  ## install with the CUDA backend into VENV, and import it
	@BATCHNORM_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-9.0+PTX} $(NOT_FAST) \
	    $(call QUIETLY,cuda) 'compiling with CUDA' \
	    $(PIP) install --verbose --no-build-isolation --no-deps --force-reinstall .
	@cd / && $(PY) -m batchnorm_ext
	@cd / && $(PY) -c 'from batchnorm_ext import _C; assert _C.build_info()["cuda"], _C.build_info()'

# What torch brings stays torch's; the rest decides which C library a wheel needs.
FROM_TORCH := libtorch.so libtorch_*.so libc10.so libc10_cuda.so libgomp.so.1 libcudart.so.*
dist: $(STAMPS)/torch $(STAMPS)/dist  ## source distribution and wheel, checked, in dist/
	@rm -rf dist build/dist
	@$(call QUIETLY,dist) 'building the distributions' \
	    $(PY) -m build --no-isolation --outdir build/dist
	@auditwheel repair $(FROM_TORCH:%=--exclude '%') --wheel-dir dist build/dist/*.whl
	@cp build/dist/*.tar.gz dist
	@$(PY) -m twine check --strict dist/*

# ---- run ---------------------------------------------------------------------------------------

# A process for each processor, as far as memory allows (tests/conftest.py).
IN_PARALLEL := -n auto --max-worker-restart 2
test: $(BUILT) $(STAMPS)/test+bench  ## every test but the slow ones
	@$(PY) -m pytest $(IN_PARALLEL) $(PYTEST_ARGS)

test-slow: $(BUILT) $(STAMPS)/test+bench  ## the slow tests: about 10 GB of memory
	$(PY) -m pytest -m slow $(PYTEST_ARGS)

VERSIONS ?= 2.11.0 $(TORCH_VERSION) newest
versions:  ## the CPU tests under several versions of torch: VERSIONS='2.11.0 newest'
	.ci/versions $(VERSIONS)

# Without the sizes that take the emulation a minute each.
EMULATED := ops policies frozen accumulation layouts forward backward autograd modules fused_modules \
            module_tracing semantics numerics determinism errors convert torch_module_db cuda_plans \
            sync_ops
test-emulated: $(BUILT) $(STAMPS)/test  ## the tests on the CUDA kernels, on the emulated device
	BATCHNORM_EXT_EMULATED_CUDA=1 $(PY) -m pytest $(EMULATED:%=tests/test_%.py) \
	    --deselect tests/test_numerics.py::test_extreme_sizes $(PYTEST_ARGS)

emulation: $(STAMPS)/test  ## the CUDA kernels on the emulated device, in every build, and coverage
	$(PY) -m pytest tests/test_emulation_runtime.py tests/test_cuda_kernels.py \
	    --deselect tests/test_cuda_kernels.py::test_coverage -m 'slow or not slow' $(PYTEST_ARGS)
	cd tests && $(PY) -m emulation.coverage

emulation-coverage: $(STAMPS)/test  ## which lines of the CUDA kernels the checks reach
	cd tests && $(PY) -m emulation.coverage

MUTANTS ?= 0/1
mutants: $(STAMPS)/test  ## planted mistakes in the CUDA kernels; MUTANTS=k/n takes a part of them
	cd tests && $(PY) -m emulation.mutants $(MUTANTS)

sanitize: $(BUILT) $(STAMPS)/test  ## the CPU kernels under AddressSanitizer and UBSan
	$(PY) -m pytest tests/test_sanitizers.py -m 'slow or not slow' $(PYTEST_ARGS)

# 3: a slow machine had no time for some cases, and the output says so.
UNLESS_SLOW := || [ $$? -eq 3 ]
benchmark: $(BUILT) $(STAMPS)/bench  ## how fast it is, and that it trains as torch does: 2 minutes
	@$(PY) -m benchmarks overview $(UNLESS_SLOW)

# Twenty minutes on 2 cores.
why-batch-norm: $(BUILT) $(STAMPS)/bench  ## every experiment in full, and docs/why-batch-norm.md
	$(PY) -m benchmarks train --full --page docs/why-batch-norm.md

benchmark-smoke: $(BUILT) $(STAMPS)/bench  ## the smallest run that exercises the benchmarks
	$(PY) -m benchmarks run --preset smoke $(UNLESS_SLOW)

# With the python3 and the torch of that machine: $(VENV) is not touched.
OUT ?= build/gpu-check
gpu-check:  ## on a machine with a GPU: build, checks, times and tests there; what it finds in OUT=folder
	PATH="$${PATH#$(VENV)/bin:}" $(PYTHON) -m benchmarks.gpu run '$(OUT)'

gpu-check-emulated: $(BUILT) $(STAMPS)/test+bench  ## the same without a GPU, each step at its smallest
	$(PY) -m benchmarks.gpu run '$(OUT)-emulated' --emulated --limit 3600

# ---- check -------------------------------------------------------------------------------------

lint: $(FOR_DEVELOPERS)  ## ruff and clang-format, changing nothing
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CXX_FILES)

format: $(FOR_DEVELOPERS)  ## ruff and clang-format, changing files
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_FILES)

typecheck: $(FOR_DEVELOPERS)  ## mypy
	$(PY) -m mypy

# The variable silences a note about mkdocs 2, which the extra keeps out. Not with --quiet, under which
# mkdocs doesn't count warnings.
docs: $(STAMPS)/docs  ## the documentation's site in build/site, warnings as errors
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

# csrc/core and csrc/cuda as C++17 for every architecture; tests/test_resources.py reads the table.
nvcc-check: $(STAMPS)/torch  ## the CUDA kernels under nvcc, warnings as errors, where there is one
	$(PY) tests/resources.py $(NVCC_TURN:%=--turn %)

clean:  ## remove what was built (.venv stays)
	rm -rf build dist *.egg-info batchnorm_ext/_C*.so .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
