# Everything sets itself up: a fresh clone, python3 with venv, g++ and make are enough.
PYTHON ?= python3
VENV ?= .venv
# Any torch >= 2.10, for instance TORCH="torch==2.11.0 --index-url <index of CUDA builds>".
TORCH ?= torch==2.13.0
PYTEST_ARGS ?= -n 2
# Where nvcc is found: one GPU architecture while developing; `make wheel` builds them all.
ARCHS ?= 90

BIN := $(VENV)/bin
CXX_FILES = $(shell git ls-files '*.h' '*.cuh' '*.cpp' '*.cu')
SOURCES := CMakeLists.txt setup.py $(shell find cmake csrc tests/simt -type f -name '*.[ch]*' 2>/dev/null)
INSTALL := env BMTARD_CUDA_ARCHS="$(ARCHS)" BMTARD_BUILD_TESTS=1 $(BIN)/pip install --no-build-isolation

# A CUDA build of torch, for make cuda-check.
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.11.0
# A GPU host may have its own Python with torch, and no network.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: help venv demo test fuzz sanitize sanitize-cpu cuda-check gpu gpu-bundle lint format docs wheel sdist test-wheel bench clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## /\1\t/p' Makefile | expand -t 12

venv: $(VENV)/installed  ## environment with bmtard (editable) and every tool

demo: venv  ## train B-MTARD and its baselines on the bundled digits
	$(BIN)/bmtard demo

test: venv  ## all tests that this machine can run
	BMTARD_REQUIRE_NATIVE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

sanitize: venv  ## the CUDA kernels on the CPU under AddressSanitizer and UndefinedBehaviorSanitizer
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.simt.sanitize $(PYTEST_ARGS) tests/simt

sanitize-cpu: venv  ## the CPU kernels and the binding under both sanitizers, with the op tests
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.sanitize_cpu

fuzz: venv  ## random calls of the ops against a NumPy oracle; FUZZ_ARGS="--seconds 600 --seed 1"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

cuda-check: $(CUDA_VENV)/installed  ## compile the CUDA kernels, check their machine code; no GPU needed
	$(CUDA_VENV)/bin/python tools/cuda_check.py

gpu:  ## on a GPU: tests, compute-sanitizer, CUDA graphs, benchmarks, tuning, training
	$(GPU_PYTHON) tools/gpu_check.py $(GPU_ARGS)

gpu-bundle: venv  ## what a bare GPU machine without a network needs; BUNDLE_ARGS="--data FOLDER"
	$(BIN)/python tools/gpu_bundle.py $(BUNDLE_ARGS)

lint: venv  ## check style and types; changes nothing
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: venv  ## rewrite to the style that lint checks
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/clang-format -i $(CXX_FILES)

docs: venv  ## the site, into build/docs; warnings are errors
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs

# auditwheel names the oldest glibc that serves. torch's libraries come from the user's torch.
wheel: venv  ## dist/bmtard-*-manylinux_*.whl, for all GPU architectures where nvcc is found
	rm -rf dist build/linux && $(BIN)/pip wheel --no-build-isolation --no-deps -w build/linux .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair -w dist \
	  --exclude 'libtorch*.so' --exclude 'libc10*.so' build/linux/*.whl
	$(BIN)/python tools/test_wheel.py --check dist/*.whl

sdist: venv  ## dist/bmtard-*.tar.gz, which builds as a checkout does
	$(BIN)/python -m build --sdist --no-isolation -o dist

test-wheel: wheel  ## that wheel under other Pythons and torches; WHEEL_ARGS="--short --only 3.10:2.10"
	$(BIN)/python tools/test_wheel.py dist/*.whl $(WHEEL_ARGS)

bench: venv  ## time the ops against what they replace; BENCH_ARGS="--quick" for a look
	$(BIN)/bmtard bench $(BENCH_ARGS)

# Before gigabytes are fetched, the tool says whether there is an nvcc.
$(CUDA_VENV)/installed:
	$(PYTHON) tools/cuda_check.py --nvcc
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/pip install $(CUDA_TORCH) numpy "cmake>=3.24" ninja \
	  "nvidia-cuda-cuobjdump==13.5.37" "nvidia-cuda-nvdisasm==13.5.37" && touch $@

clean:  ## remove what was built; the environment stays
	rm -rf build dist bmtard/_C*.so *.egg-info $(VENV)/installed

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "make: $(PYTHON) cannot create a virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/pip install $(TORCH) "setuptools>=77" "cmake>=3.24" ninja "pybind11>=2.13" && touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml $(SOURCES)
	$(INSTALL) -e '.[dev]' && touch $@
