# Two commands for a fresh machine: `make quickstart` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
KIND := $(if $(GPU),gpu,cpu)
# The first interpreter that runs and is 3.11 or 3.12 (a version manager's shim can exist and still not run).
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do "$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar=off

.PHONY: help install dev quickstart test peers clean

help: ## what each target does
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed-$(KIND): requirements/$(KIND).txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or 3.12 found. Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "Installing into $(VENV) ($$($(PYTHON) --version), $(KIND) host): torch, then 111 pinned packages"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --no-deps -r requirements/$(KIND).txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-$(KIND) requirements/dev.txt
	$(PIP) --no-deps -r requirements/dev.txt
	@touch $@

install: $(VENV)/.installed-$(KIND) ## a virtual environment with everything to train and serve (GPU=1 on a GPU host)
dev: $(VENV)/.installed-dev ## the same with the gate's tools

quickstart: install ## real data, a trained funnel, a live service, three pages in the terminal (ONCE=1: then exit)
	$(BIN)/rayfunnel quickstart --config configs/quickstart.yaml $(if $(ONCE),--once)

test: dev ## the gate: format, lint, types, every test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not ray" -n logical --maxprocesses 8
	$(BIN)/python -m pytest -m ray

.venv-peers/.installed: requirements/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --disable-pip-version-check --quiet torch==2.13.0
	.venv-peers/bin/python -m pip install --disable-pip-version-check --quiet -r requirements/peers.txt
	@touch $@

peers: .venv-peers/.installed ## an environment of its own for the peers that benchmarks compare with

clean: ## forget the environment and all state (data, runs, registry, events)
	rm -rf $(VENV) .venv-peers .rayfunnel
