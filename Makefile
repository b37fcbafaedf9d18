# Each target makes its own virtual environment in $(VENV); nothing else is needed
# than Python 3.11 or newer.

PYTHON ?= $(shell python3.11 --version >/dev/null 2>&1 && echo python3.11 || echo python3)
VENV ?= .venv

.PHONY: demo test lint

# Prepares captioned shapes, trains a small cascade and samples it, in demo/. Linux then
# gives out the memory of each step in large pages (benchmarks/README.md).
demo: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
demo: $(VENV)/installed
	$(VENV)/bin/python -m imagen_jax.demo --output=demo $(if $(SECONDS),--seconds=$(SECONDS))

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	@touch $@
