# Everything runs inside $(VENV), made on first use from python3 (3.10 or newer) and its venv module.
VENV ?= .venv
PYTHON ?= python3
TORCH := torch==2.13.0
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
DEMO_ARGS ?=
TEST_ARGS ?=
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help install demo test aot lint format bench gpu wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

# torch first and alone: then the plain CPU build is taken where the package index offers one.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python >= 3.10 is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=/path/to/python3")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt $(TORCH)
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

$(VENV)/.demo: $(VENV)/.installed requirements-demo.txt
	$(PIP) install --quiet -c constraints.txt -e ".[demo]"
	$(PIP) install --quiet --no-deps -r requirements-demo.txt
	@touch $@

install: $(VENV)/.installed ## the virtual environment, with ept installed in place

demo: $(VENV)/.demo ## train EPT on a small real model and real headlines, and show the score before and after
	$(VENV)/bin/python examples/demo.py $(DEMO_ARGS)

test: $(VENV)/.installed ## all tests but those that need a GPU, two at a time (TEST_ARGS="-k name" to choose)
	OMP_NUM_THREADS=1 $(OFFLINE) $(VENV)/bin/python -m pytest -n 2 -m "not gpu" $(TEST_ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -n 2 tests/kernels/triton_kernels
	$(MAKE) aot

aot: $(VENV)/.installed ## compile every Triton kernel for sm_80, sm_90, sm_100 and gfx942; fails on spills
	$(VENV)/bin/python -m ept_kernels.aot

lint: $(VENV)/.installed ## ruff (format and rules) and mypy
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy

format: $(VENV)/.installed ## let ruff format and fix
	$(VENV)/bin/python -m ruff format .
	$(VENV)/bin/python -m ruff check --fix .

bench: $(VENV)/.demo ## what a training step costs beside the bare frozen model
	$(VENV)/bin/python benchmarks/step_overhead.py

gpu: $(VENV)/.demo ## the tests that need a GPU and the step benchmark on it; fails without one
	@$(VENV)/bin/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit(f"make gpu: torch {torch.__version__} sees no CUDA device; run it on a machine with a GPU and a CUDA build of torch")'
	$(OFFLINE) $(VENV)/bin/python -m pytest -m gpu $(TEST_ARGS)
	$(VENV)/bin/python benchmarks/step_overhead.py

wheel: $(VENV)/.installed ## dist/*.whl
	$(VENV)/bin/python -m build --wheel --outdir dist

clean: ## remove the environment, caches and build output (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .benchmarks .hypothesis
