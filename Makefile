# Options are make variables: make engines MODEL=da3-small WEIGHTS=hub. `make help` lists the commands.

.DEFAULT_GOAL := help
SHELL := bash
.SUFFIXES:

# cpu, or cuda for the CUDA 12.8 stack
DEVICE ?= cpu
IMAGE ?= examples/temple.jpg
OUT ?= depth.png
TARGETS ?=
# Recipes read these from the environment, so a file name may hold any character.
export PYTHON IMAGE OUT TARGETS

PY := .venv/bin/python
READY := .venv/.installed-$(DEVICE)

.PHONY: help setup engines depth parity test lint types format clean

help:  ## list the commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(READY)  ## install what the others need into .venv (DEVICE=cpu|cuda)

$(READY): $(wildcard requirements/*.txt)
	@scripts/setup "$(DEVICE)"

engines: $(READY)  ## build an engine: MODEL HEAD WEIGHTS RAY_POSE REVISION TARGETS ENGINES_DIR
	@$(PY) -m export engines --targets "$$TARGETS"

parity: $(READY)  ## measure an engine against upstream: MODEL HEAD WEIGHTS ENGINES_DIR
	@$(PY) -m export parity

depth: $(READY)  ## depth picture of a photo: IMAGE OUT MODEL HEAD BACKEND ENGINES_DIR
	@$(PY) -m runtime depth --out "$$OUT" -- "$$IMAGE"

test: $(READY)  ## run the tests
	@$(PY) -m pytest

lint: $(READY)  ## check style and formatting
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

types: $(READY)  ## check types
	@$(PY) -m mypy

format: $(READY)  ## format the code
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean:  ## remove what was built and installed, but no engine
	rm -rf .venv .setup.lock .cache .mypy_cache .pytest_cache .ruff_cache depth.png
