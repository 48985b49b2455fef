# Every command makes the virtual environment it needs: `make train` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# one thread a process: tests are many small computations, spread over processes by xdist
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet
STAMP := $(VENV)/.installed
# without an NVIDIA driver a pinned torch spares gigabytes of CUDA libraries; with one, the newest that fits
TORCH := $(if $(wildcard /proc/driver/nvidia/version /dev/nvidiactl /dev/dxg),,torch==2.13.0)
TRAIN_ARGS ?=
BENCH_ARGS ?=
PART ?= all
N ?= 10000
SEED ?= 0
BACKEND ?= torch

.DEFAULT_GOAL := help
.PHONY: help train test test-oldest fuzz bench gpu kernels-report docs check format clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) --editable '.[dev]'
	@touch $@

train: $(STAMP) ## train a VAE on the embedded images and show where the results are
	$(BIN)/fastvae train $(TRAIN_ARGS)

check: $(STAMP) ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the interpreter and the compiler cannot share a process: Triton decorates its own functions for one or the other on import
test: check ## everything that CI runs
	TRITON_INTERPRET=1 $(PYTEST) -n auto -m "not gpu and not compiled"
	TRITON_INTERPRET=0 $(PYTEST) -n auto -m compiled
	$(PYTEST) benchmarks --benchmark-disable

# in an environment of its own; TORCH=torch==2.11.* for the oldest PyTorch too, whose wheel is a large one with CUDA
OLDEST := $(VENV)-oldest
OLDEST_TESTS ?= $(addprefix tests/,$(addsuffix .py,$(addprefix ops/test_,elbo reparam_kl reparam_prior latent_stats \
	weights masked_and_empty small_arguments noise_state) $(addprefix kernels/test_,philox counts_kernels)))
test-oldest: ## the tests of ops and kernels with the oldest supported Triton, interpreted
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH) 'triton==3.6.*' 'numpy<2.4' \
		pytest pytest-xdist hypothesis
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest --quiet -n auto -k triton \
		-m "not gpu and not compiled" $(OLDEST_TESTS)

fuzz: $(STAMP) ## compare N random losses with a formula in float64 (SEED, BACKEND=triton or torch)
	$(BIN)/python -m tests.fuzz --cases $(N) --seed $(SEED) --backend $(BACKEND)

# a heap that keeps what is freed, where malloc is glibc's: else it is chance which provider gets fresh pages
bench: $(STAMP) ## compare fastvae with PyTorch and other packages on this machine (BENCH_ARGS="--scale full --record NAME")
	GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184 \
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

gpu: ## on a machine with a GPU: all GPU tests, then timings, into benchmarks/results (PART=tests, bench or all)
	PYTHONPATH=.:kernels $(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu --part $(PART)

kernels-report: $(STAMP) ## what each kernel moves and compiles to, as a table
	$(BIN)/python -m tests.helpers.kernels_report

docs: $(STAMP) ## HTML pages of the public API from its docstrings, in build/docs
	$(BIN)/pdoc --docformat google --output-directory build/docs fastvae '!.*\._'

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what the other commands made (runs/ is yours and stays)
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .benchmarks .hypothesis
