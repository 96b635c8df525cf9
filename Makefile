# `make demo` and `make test` need only Python 3.11+ and pip: each makes .venv when it is missing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed

.PHONY: demo test lint bench

$(READY): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(READY)
	$(RUN) examples/demo.py $(ARGS)

test: $(READY)
	$(RUN) -m pytest -q $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(READY)
	$(RUN) -m pytest benchmarks -q --benchmark-only $(ARGS)
