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
# Recipes read these from the environment, so a file name may contain any character.
export PYTHON IMAGE OUT TARGETS REPO
# Tests that install wheels and images' packages, measure every case, build INT8 and bf16, train, evaluate, soak, fill
# memory or time backends: beside `make test`, in CI too.
LONG_TESTS := tests/images tests/export/test_every_case.py tests/export/test_cpu_precisions.py tests/export/test_nano.py \
  tests/export/test_training.py tests/export/test_distill.py tests/export/test_evaluate.py \
  tests/runtime/test_memory.py tests/runtime/test_soak.py tests/test_bench_processes.py

BIN := .venv/bin
PY := $(BIN)/python
RUNTIME := $(BIN)/da3-runtime
EXPORT := $(BIN)/da3-export
READY := .venv/.installed-$(DEVICE)
TOOLS := .cache/tools
AUDIT := $(TOOLS)/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off

.PHONY: help setup demo engines depth parity serve prefetch publish-engines train-nano eval-nano bench-gpu bench-serving \
  bench-views bench-points bench-cpu bench-folder bench-batch bench-distill image-sizes bench-cold-start test test-long batch fuzz soak memory lint types format secrets audit lock dist docs three pictures clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## install the dependencies into .venv: DEVICE=cpu|cuda

$(READY): $(wildcard requirements/*.txt) runtime/pyproject.toml export/pyproject.toml
	@scripts/setup "$(DEVICE)"

demo: $(READY)  ## build da3-nano's engine and run a photo and rendered scenes through it
	@MODEL=da3-nano HEAD=dpt WEIGHTS= $(EXPORT) engines --targets "$$TARGETS"
	@for name in temple scene; do \
	  MODEL=da3-nano HEAD=dpt WEIGHTS= $(RUNTIME) depth \
	    examples/$$name.* --out "demo-$$name.png" || exit; \
	done
	@MODEL=da3-nano HEAD=dpt WEIGHTS= $(RUNTIME) scene examples/walk --out demo-walk
	@echo "Wrote demo-temple.png (a photo), demo-scene.png (a rendered scene) and demo-walk (four photos of one)."

engines: $(READY)  ## build an engine: MODEL HEAD WEIGHTS RAY_POSE REVISION TARGETS PRECISION ENGINE_DIR
	@$(EXPORT) engines --targets "$$TARGETS"

parity: $(READY)  ## measure an engine against upstream: MODEL HEAD WEIGHTS ENGINE_DIR
	@$(EXPORT) parity

depth: $(READY)  ## depth preview of a photo: IMAGE OUT MODEL HEAD BACKEND PRECISION ENGINE_DIR
	@$(RUNTIME) depth --out "$$OUT" -- "$$IMAGE"

serve: $(READY)  ## serve HTTP requests: PORT MODEL HEAD DA3_HOST DA3_API_KEY
	@$(RUNTIME) serve

prefetch: $(READY)  ## download a checkpoint, and its published engine if ENGINE_REPO is set: MODEL HEAD ENGINE_REPO ENGINE_ONLY
	@$(RUNTIME) prefetch $${ENGINE_ONLY:+--engine-only}

publish-engines: $(READY)  ## upload the engines in ENGINE_DIR to the hub: REPO MODEL HEAD DRY_RUN
	@$(EXPORT) publish --repo "$$REPO" $${DRY_RUN:+--dry-run}

train-nano: $(READY)  ## train da3-nano and its SDT head into .cache/nano: STEPS
	@$(PY) -m tools.nano train --out .cache/nano $${STEPS:+--steps $$STEPS}

eval-nano: $(READY)  ## measure the accuracy of da3-nano's engines on held-out scenes
	@for head in dpt sdt; do MODEL=da3-nano HEAD=$$head WEIGHTS= $(EXPORT) engines || exit; done
	@$(PY) -m tools.nano render --out .cache/nano-scenes --count 64
	@MODEL=da3-nano $(EXPORT) evaluate --data .cache/nano-scenes --json benchmarks/results/nano.json
	@$(PY) -m tools.nano scenes --json benchmarks/results/nano_scenes.json

# The default of OUT is a preview; here OUT is the results file unless the user sets it.
bench-gpu: OUT := $(if $(filter file,$(origin OUT)),benchmarks/results/gpu.json,$(OUT))
bench-gpu: $(READY)  ## measure every backend on this GPU (DEVICE=cuda): MODELS HEADS SIZES BATCHES CONTENDERS BUILD OUT
	@$(PY) -m benchmarks.backends $${BUILD:+--build}

bench-serving: $(READY)  ## measure the overhead of a request, and throughput under load: ENGINE_DIR
	@MODEL=da3-nano HEAD=dpt WEIGHTS= $(EXPORT) engines >/dev/null
	@MODEL=da3-nano HEAD=dpt $(PY) -m benchmarks.serving

bench-views: $(READY)  ## measure the time of a scene by its number of views: MODEL ENGINE_DIR
	@MODEL=$${MODEL:-da3-nano} $(PY) -m benchmarks.views

bench-points: $(READY)  ## measure the time of writing a million points
	@$(PY) -m benchmarks.points

bench-cpu: $(READY)  ## measure FP32, INT8 and bf16 on this CPU beside upstream's network
	@$(PY) -m benchmarks.cpu

bench-folder: $(READY)  ## measure the throughput of a folder of photos, against its bound
	@MODEL=da3-nano HEAD=dpt WEIGHTS= $(EXPORT) engines >/dev/null
	@$(PY) -m benchmarks.folder

bench-batch: $(READY)  ## measure da3-runtime batch against da3-runtime depth: COUNT (3000), SIDE (168)
	@MODEL=da3-nano HEAD=dpt WEIGHTS= $(EXPORT) engines >/dev/null
	@MODEL=da3-nano HEAD=dpt $(PY) -m benchmarks.batch $${COUNT:+--count $$COUNT} $${SIDE:+--side $$SIDE}

bench-distill: $(READY)  ## measure the distillation of SDT heads: cost with da3-small, quality with da3-nano
	@$(PY) -m benchmarks.distill

image-sizes: $(READY)  ## measure the size of the serving images, package by package: IMAGE_PYTHON
	@$(PY) -m benchmarks.images

bench-cold-start: $(READY)  ## measure the time from process start to first result, engine and eager: ENGINE_DIR
	@$(PY) -m benchmarks.cold_start

test: $(READY)  ## run the tests
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(addprefix --ignore=,$(LONG_TESTS))

test-long: $(READY)  ## test wheels, images, every case of parity, INT8, bf16, da3-nano, training, evaluate, memory, soak and bench-gpu
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(LONG_TESTS)

batch: $(READY)  ## run batches on a Ray cluster of two nodes here, with lost processes: BATCH (10000 photos)
	@BATCH=$${BATCH:-10000} $(PY) -m pytest -q --timeout 3600 -k lost_node tests/runtime/test_batch_cluster.py
	@BATCH=240 $(PY) -m pytest -q -k 'not lost_node' tests/runtime/test_batch_cluster.py

fuzz: $(READY)  ## send mutated images and requests to the service: FUZZ (20000 of each kind)
	@FUZZ=$${FUZZ:-20000} FUZZ_OUT=benchmarks/results/fuzz.json $(PY) -m pytest -q --timeout 3600 tests/runtime/test_fuzz.py tests/runtime/test_openapi.py

soak: $(READY)  ## run a server under valid, invalid and disconnecting clients: SOAK (600 seconds)
	@SOAK=$${SOAK:-600} SOAK_OUT=benchmarks/results/soak.json $(PY) -m pytest -q tests/runtime/test_soak.py

memory: $(READY)  ## test the memory limits of images, requests and models
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

secrets: $(TOOLS)/.installed  ## search for secrets in the files and in git's history
	@$(TOOLS)/bin/kingfisher scan . --exclude .venv --exclude .cache --no-validate --no-update-check --redact

audit: $(TOOLS)/.installed  ## search for known vulnerabilities of pinned packages (needs the package index)
	@for list in requirements/*.txt; do $(AUDIT) -r "$$list" || exit; done

lock: $(TOOLS)/.installed  ## write requirements/*.txt from both pyproject.toml: LOCK (options of uv, such as --upgrade)
	@scripts/lock $(LOCK)

dist: $(TOOLS)/.installed  ## build and check wheels and source distributions of both packages in dist/
	@rm -rf dist
	@for package in runtime export; do $(TOOLS)/bin/python -m build --quiet --outdir dist $$package || exit; done
	@$(TOOLS)/bin/twine check --strict dist/*

docs: $(READY)  ## generate pages of docs/ from code and results
	@$(PY) scripts/docs.py

three:  ## bundle three.js for the page, from the versions in tools/page (needs Node.js)
	@cd tools/page && npm ci --silent && node_modules/.bin/esbuild three.js --bundle --minify --format=esm \
	  --legal-comments=inline --log-level=warning --outfile=../../runtime/da3_runtime/serve/page/files/three.js

pictures:  ## render docs/*.dot as SVG (needs Graphviz)
	@for name in docs/*.dot; do dot -Tsvg "$$name" -o "$${name%.dot}.svg" || exit; done

clean:  ## remove everything built and installed, except engines
	rm -rf .venv .setup.lock .cache .mypy_cache .pytest_cache .ruff_cache dist depth.png demo-*
