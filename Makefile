# make demo    sets everything up and runs the demonstration
# make test    sets everything up and runs the tests
# make lint    style and types; make native: the C++ kernels
# make sanitize    the kernels' tests under AddressSanitizer; make sanitize-quick: most of them, on one instruction set
#
# A fresh machine needs Python 3.11 or later with venv, and a C++ compiler for the kernels. PYTHON=... names another
# interpreter, CXX=... another compiler.

.DELETE_ON_ERROR:
.PHONY: demo test lint native sanitize sanitize-quick clean

TORCH := torch==2.13.0
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
    $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
ifeq ($(origin CXX),default)  # make would say g++ whether there is one or not
CXX := $(shell command -v c++ || command -v g++ || command -v clang++)
endif
export CXX
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CMAKE := $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -S .
KERNELS := CMakeLists.txt $(wildcard src/nacre/core/*.h src/nacre/core/*.cpp src/nacre/layers/*/*kernel_cpu*)

demo: native
	$(BIN)/nacre demo

# one thread a worker: the workers themselves fill the cores, and take over tests from each other to the end
test: native
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: .venv/.packages
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# ---- set-up, each step once

.venv/pyvenv.cfg:
	@test -n "$(PYTHON)" || { echo "nacre needs Python 3.11 or later; none was found on the PATH. Name one with" \
	    "make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "The Python module venv is needed (Debian, Ubuntu:" \
	    "apt install python3-venv)."; exit 1; }

# torch first, alone and pinned: asked for by another package, pip would take another version of it
.venv/.torch: .venv/pyvenv.cfg Makefile
	$(PIP) install $(TORCH)
	@touch $@

.venv/.packages: .venv/.torch pyproject.toml
	$(PIP) install $(TORCH) --editable '.[all,dev]' --config-settings wheel.cmake=false --config-settings editable.mode=inplace
	@touch $@

native: .venv/.kernels

.venv/.kernels: .venv/.packages $(KERNELS)
	@if [ -n "$(CXX)" ]; then \
	    $(CMAKE) -B build/native && $(BIN)/cmake --build build/native && $(BIN)/cmake --install build/native && \
	    touch $@; \
	else \
	    rm -f src/nacre/_kernels_* src/nacre/_autograd_*; \
	    echo "No C++ compiler was found: nacre runs on its formulas, which are slower."; \
	fi

# ---- the kernels under AddressSanitizer and UndefinedBehaviorSanitizer

# Which of a processor's instruction sets torch is told of: best is what it has. Two tests are left out, of malloc and of
# a fork beside a running thread: the sanitizer has a malloc of its own, which does not look after forks.
CAPABILITIES := default avx2 best
SANITIZED_LIBRARIES := all
SANITIZED_TESTS := tests/test_native.py tests/test_memory.py tests/test_cpu_math.py tests/test_contract.py \
    $(addprefix tests/layers/test_,$(addsuffix .py,layer_norm activation_kernel dropout softmax embedding \
    cross_entropy_kernel linear_kernel conv2d_kernel attention_kernel recurrent_kernel linear_cross_entropy_kernel)) \
    tests/blocks/test_fused.py tests/blocks/test_feed_forward.py

SANITIZED_NAMES := not lesser and not whole_process and not fork_finds \
    and (not test_contract or forward_and_gradients or non_contiguous or same_bits)

sanitize: .venv/.packages
	$(CMAKE) -B build/sanitize -DNACRE_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize --target $(SANITIZED_LIBRARIES)
	rm -f build/sanitize/report.*
	for capability in $(CAPABILITIES); do \
	    if [ $$capability = best ]; then unset ATEN_CPU_CAPABILITY; else export ATEN_CPU_CAPABILITY=$$capability; fi; \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0:log_path=$(CURDIR)/build/sanitize/report OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive \
	    $(BIN)/python -m pytest -n 2 --kernels build/sanitize $(SANITIZED_TESTS) -k "$(SANITIZED_NAMES)" || \
	        { cat build/sanitize/report.*; exit 1; }; \
	done

# what .ci/run has the time for: the kernels' own tests and the contract's shapes, with the best instruction set
QUICK_NAMES := not lesser and not whole_process and not fork_finds and not compile \
    and (not test_contract or forward_and_gradients)

sanitize-quick: native
	$(MAKE) sanitize CAPABILITIES=best SANITIZED_NAMES="$(QUICK_NAMES)" \
	    SANITIZED_LIBRARIES=$$($(BIN)/python -c "from nacre.core import native; print(native.find().stem[1:])")

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache src/nacre/_kernels_* src/nacre/_autograd_*
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
