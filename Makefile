# Each target sets up what it needs: a virtual environment with pinned versions, once.
#   make demo    a real model tuned through the service, start to end
#   make up      the service until Ctrl-C
#   make test    the tests
#   make check   what CI runs: linters, types, import contracts, and all tests but the GPU ones
# ARGS goes to what a target runs: make test ARGS=tests/tunery, make demo ARGS='--set max_steps=10'

VENV   ?= .venv
JOBS   ?= 2
SERVERS ?= wheel
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet
RUN    := $(VENV)/.run-stamp
DEV    := $(VENV)/.dev-stamp

.DEFAULT_GOAL := help
.PHONY: help demo up test test-services check lint types imports drift format clean

help:
	@sed -n 's/^#   //p' Makefile

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one with PYTHON=..."; exit 1; }
	@echo "making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# torch's pin goes first: a +cpu build that is there already satisfies it and stays.
$(RUN): pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing Tunery and what it runs on (a few minutes the first time)"
	@$(PIP) -c constraints.txt -e '.[train,server,local]'
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing Tunery and the tools it is tested with (a few minutes the first time)"
	@$(PIP) -c constraints.txt -e '.[train,server,local,dev]'
	@touch $@ $(RUN)

demo: $(RUN)
	@$(BIN)/python examples/demo.py $(ARGS)

up: $(RUN)
	@$(BIN)/tunery up

test: $(DEV)
	@$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not gpu" $(ARGS)
	@echo "the tests pass. Next: make check runs the slow ones, linters and types as well"

test-services: $(DEV)
	@TUNERY_TEST_SERVERS=$(SERVERS) $(BIN)/python -m pytest -n $(JOBS) \
		-m "db and not slow and not e2e" tests/core tests/worker $(ARGS)
	@echo "the service's tests pass on the servers: $(SERVERS)"

check: lint types imports drift $(DEV)
	@$(BIN)/python -m pytest -n $(JOBS) -m "not gpu" $(ARGS)
	@echo "all that CI checks is in order"

lint: $(DEV)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(DEV)
	@$(BIN)/mypy

imports: $(DEV)
	@$(BIN)/lint-imports

drift: $(DEV)
	@$(BIN)/python scripts/drift.py

format: $(DEV)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	@echo "removed the environment and caches; ~/.tunery (jobs, models) is left alone"
