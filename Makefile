# Options are make variables: make engines MODEL=da3-small WEIGHTS=hub. `make help` lists the commands.

.DEFAULT_GOAL := help
SHELL := bash
.SUFFIXES:

# cpu, or cuda for the CUDA 12.8 stack
DEVICE ?= cpu
IMAGE ?= examples/temple.jpg
OUT ?= depth.png
TARGETS ?=
REPO ?=
# Recipes read these from the environment, so a file name may hold any character.
export PYTHON IMAGE OUT TARGETS REPO

BIN := .venv/bin
PY := $(BIN)/python
RUNTIME := $(BIN)/da3-runtime
EXPORT := $(BIN)/da3-export
READY := .venv/.installed-$(DEVICE)
TOOLS := .cache/tools
AUDIT := $(TOOLS)/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off

.PHONY: help setup demo engines depth parity serve prefetch publish-engines train-nano eval-nano bench-gpu bench-serving \
  image-sizes bench-cold-start test fuzz soak memory lint types format secrets audit lock dist docs pictures clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## install what the others need into .venv (DEVICE=cpu|cuda)

$(READY): $(wildcard requirements/*.txt) runtime/pyproject.toml export/pyproject.toml
	@scripts/setup "$(DEVICE)"

demo: $(READY)  ## build da3-nano's engine and run a photo and a rendered scene through it
	@MODEL=da3-nano HEAD=dpt WEIGHTS= $(EXPORT) engines --targets "$$TARGETS"
	@for name in temple scene; do \
	  MODEL=da3-nano HEAD=dpt WEIGHTS= $(RUNTIME) depth \
	    examples/$$name.* --out "demo-$$name.png" || exit; \
	done
	@echo "Wrote demo-temple.png (a photo) and demo-scene.png (a rendered scene)."

engines: $(READY)  ## build an engine: MODEL HEAD WEIGHTS RAY_POSE REVISION TARGETS ENGINE_DIR
	@$(EXPORT) engines --targets "$$TARGETS"

parity: $(READY)  ## measure an engine against upstream: MODEL HEAD WEIGHTS ENGINE_DIR
	@$(EXPORT) parity

depth: $(READY)  ## depth picture of a photo: IMAGE OUT MODEL HEAD BACKEND ENGINE_DIR
	@$(RUNTIME) depth --out "$$OUT" -- "$$IMAGE"

serve: $(READY)  ## answer HTTP requests: PORT MODEL HEAD DA3_HOST DA3_API_KEY
	@$(RUNTIME) serve

prefetch: $(READY)  ## fetch a checkpoint and its published engine: MODEL HEAD ENGINE_REPO
	@$(RUNTIME) prefetch

publish-engines: $(READY)  ## upload the engines of ENGINE_DIR: REPO
	@$(EXPORT) publish --repo "$$REPO"

train-nano: $(READY)  ## train da3-nano and its SDT head anew into .cache/nano: STEPS
	@$(PY) -m tools.nano train --out .cache/nano $${STEPS:+--steps $$STEPS}

eval-nano: $(READY)  ## accuracy of da3-nano on held-out scenes, for every engine
	@for head in dpt sdt; do MODEL=da3-nano HEAD=$$head WEIGHTS= $(EXPORT) engines || exit; done
	@$(PY) -m tools.nano render --out .cache/nano-scenes --count 64
	@MODEL=da3-nano $(EXPORT) evaluate --data .cache/nano-scenes --json benchmarks/results/nano.json

# OUT is the picture's name unless somebody gives it.
bench-gpu: OUT := $(if $(filter file,$(origin OUT)),benchmarks/results/gpu.json,$(OUT))
bench-gpu: $(READY)  ## measure every backend on this GPU (DEVICE=cuda): MODELS HEADS SIZES BATCHES CONTENDERS BUILD OUT
	@$(PY) -m benchmarks.backends $${BUILD:+--build}

bench-serving: $(READY)  ## what a request costs outside the model, and how requests share it: ENGINE_DIR
	@MODEL=da3-nano HEAD=dpt WEIGHTS= $(EXPORT) engines >/dev/null
	@MODEL=da3-nano HEAD=dpt $(PY) -m benchmarks.serving

image-sizes: $(READY)  ## what the serving images weigh, package by package: IMAGE_PYTHON
	@$(PY) -m benchmarks.images

bench-cold-start: $(READY)  ## seconds from a process's start to its first answer, beside eager: ENGINE_DIR
	@$(PY) -m benchmarks.cold_start

test: $(READY)  ## run the tests
	@$(PY) -m pytest -n 2 --dist loadfile

fuzz: $(READY)  ## mutated images and requests through the service: FUZZ (20000 of each kind)
	@FUZZ=$${FUZZ:-20000} FUZZ_OUT=benchmarks/results/fuzz.json $(PY) -m pytest -q --timeout 3600 tests/runtime/test_fuzz.py

soak: $(READY)  ## good, bad and rude clients at a server for a while: SOAK (600 seconds)
	@SOAK=$${SOAK:-600} SOAK_OUT=benchmarks/results/soak.json $(PY) -m pytest -q tests/runtime/test_soak.py

memory: $(READY)  ## bounds on the memory of images, requests and models
	@MEMORY=1 $(PY) -m pytest -q tests/runtime/test_memory.py

lint: $(READY)  ## check style and formatting
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

types: $(READY)  ## check types
	@$(PY) -m mypy

format: $(READY)  ## format the code
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

$(TOOLS)/.installed: requirements/tools.txt
	@$${PYTHON:-python3} -m venv --clear $(TOOLS)
	@$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

secrets: $(TOOLS)/.installed  ## look for secrets in the files and in git's history
	@$(TOOLS)/bin/kingfisher scan . --exclude .venv --exclude .cache --no-validate --no-update-check --redact

audit: $(TOOLS)/.installed  ## look for known vulnerabilities of what is pinned (asks the package index)
	@for list in requirements/*.txt; do $(AUDIT) -r "$$list" || exit; done

lock: $(TOOLS)/.installed  ## write requirements/*.txt from the pyprojects: LOCK (uv's options, such as --upgrade)
	@scripts/lock $(LOCK)

dist: $(TOOLS)/.installed  ## build and check the wheels and source packages of both packages into dist/
	@rm -rf dist
	@for package in runtime export; do $(TOOLS)/bin/python -m build --quiet --outdir dist $$package || exit; done
	@$(TOOLS)/bin/twine check --strict dist/*

docs: $(READY)  ## write the generated pages of docs/
	@$(PY) scripts/docs.py

pictures:  ## draw docs/*.dot (needs Graphviz)
	@for name in docs/*.dot; do dot -Tsvg "$$name" -o "$${name%.dot}.svg" || exit; done

clean:  ## remove what was built and installed, but no engine
	rm -rf .venv .setup.lock .cache .mypy_cache .pytest_cache .ruff_cache dist depth.png demo-*.png
