# `make demo` and `make test` need only Python 3.11+ and pip: each makes .venv when it is missing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed

.PHONY: demo test lint bench gpu gpu-tune gpu-dry

$(READY): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(READY)
	$(RUN) examples/demo.py $(ARGS)

test: $(READY)
	$(RUN) -m pytest -q -n auto --maxprocesses 4 $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(READY)
	$(RUN) -m pytest benchmarks -q --benchmark-only $(ARGS)

# On the GPU of this machine, with the system's Python: the tests, then the benchmarks.
# make gpu OUT=folder [PARTS=decode,evict,...]; make gpu-tune OUT=table.json
gpu:
	PYTHONPATH=src:benchmarks:$$PYTHONPATH $(PYTHON) -m gpu --out "$(OUT)" --parts "$(PARTS)"

gpu-tune:
	PYTHONPATH=src:benchmarks:$$PYTHONPATH $(PYTHON) -m gpu.tune --out "$(OUT)"

gpu-dry: $(READY)
	PYTHONPATH=src:benchmarks $(RUN) -m gpu --dry --parts "$(PARTS)"
