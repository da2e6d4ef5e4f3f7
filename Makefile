# Everything happens in .venv, which is made once and reused while pyproject.toml, setup.py and cshim stay as they are.
# Needs: Python 3.11 or newer, make, a C compiler. `make PYTHON=/path/to/python3` picks another interpreter.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { command -v $$p; break; }; done)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
STEPS  ?= 30
ARGS   ?=
JOBS   ?= $(if $(ARGS),0,2)

.PHONY: demo test lint wheel setup clean help

help:
	@echo "make demo   train the resnet example through JAX_PLATFORMS=mps (STEPS=$(STEPS))"
	@echo "make test   run the tests, in JOBS=2 processes (ARGS='-k name' goes to pytest, and then it is one)"
	@echo "make lint   ruff and mypy"
	@echo "make wheel  build dist/*.whl and dist/*.tar.gz"
	@echo "make clean  remove .venv, build and dist"

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py MANIFEST.in $(wildcard cshim/*)
	@test -n "$(PYTHON)" || { echo "jax-mps needs Python 3.11 or newer; none was found. Try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "python -m venv failed (on Debian: apt install python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install -q --disable-pip-version-check 'pip>=25.1'
	$(BIN)/python -m pip install -q --disable-pip-version-check --group dev -e .
	@touch $@

demo: $(STAMP)
	JAX_PLATFORMS=mps $(BIN)/python examples/resnet/main.py --steps $(STEPS)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check build
	rm -rf dist
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist *.egg-info
