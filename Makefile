# Each target first makes the virtual environment $(VENV) if it is missing; nothing is
# needed but Python 3.11 or newer.

PYTHON ?= $(shell python3.11 --version >/dev/null 2>&1 && echo python3.11 || echo python3)
VENV ?= .venv

.PHONY: demo test check lint dist

# Trains and samples a small cascade on captioned shapes, in demo/. ENCODER=FOLDER, of a
# pretrained text encoder, has it trained on many wordings. With the tunable, Linux
# backs the temporaries of a step with large pages.
demo: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
demo: $(VENV)/installed
	$(VENV)/bin/python -m imagen_jax.demo --output=demo $(if $(SECONDS),--seconds=$(SECONDS)) \
		$(if $(ENCODER),--encoder=$(ENCODER))

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest

# The tests of less than a second, in two minutes on two cores.
check: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m "not slow"

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# A wheel and the sources, in dist/.
dist: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet build
	$(VENV)/bin/python -m build

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	@touch $@
