# Every target works on a machine that has Python 3.11 or newer and nothing else.
# PYTHON=<interpreter> uses an environment you already have instead of .venv.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
CONSTRAINTS := .constraints/core.txt
BASE_PYTHON ?= $(shell command -v python3.11 || command -v python3)
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml $(CONSTRAINTS) | cksum | cut -d' ' -f1)

ifdef PYTHON
  PY := $(PYTHON)
  ENVIRONMENT :=
else
  PY := $(VENV)/bin/python
  ENVIRONMENT := $(STAMP)
endif
SCRIPTS = $(shell $(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')

SGLANG_VENV := build/sglang-venv
SGLANG_FILES := .constraints/sglang.txt tests/sglang/requirements.txt
SGLANG_STAMP := $(SGLANG_VENV)/.installed-$(shell cat $(SGLANG_FILES) | cksum | cut -d' ' -f1)

# One arithmetic thread per process: pools share the machine, and so do test workers.
export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
TEST_WORKERS ?= 2
# For the tests that start whole clusters: on two cores a second one makes Ray's own start time out.
CLUSTER_WORKERS ?= 1
PYTEST := HF_HUB_OFFLINE=1 $(PY) -m pytest

.PHONY: plotting $(shell awk -F: '/^[a-z-]+:.*## /{print $$1}' $(MAKEFILE_LIST))

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(ENVIRONMENT) ## Create .venv with everything; does nothing when it is up to date
	@$(PY) -c 'import sys; print("Paceline runs in", sys.prefix)'

$(STAMP):
	@test -n "$(BASE_PYTHON)" || { echo "Python 3.11 or newer is needed: none found on PATH" >&2; exit 1; }
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; BASE_PYTHON=<path> names one" >&2; exit 1; }
	@echo "Installing into $(VENV) (some minutes the first time)"
	@test -x $(VENV)/bin/python || $(BASE_PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.installed-*
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev,train]'
	@touch $@

fmt: $(ENVIRONMENT) ## Format the code and apply safe lint fixes
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

check: check-format check-lint check-types check-layers check-protos chart check-docs check-spelling check-repository ## Everything CI checks besides the tests

check-format: $(ENVIRONMENT) ## Formatting
	$(PY) -m ruff format --check .

check-lint: $(ENVIRONMENT) ## Lint rules
	$(PY) -m ruff check .

check-types: $(ENVIRONMENT) ## mypy, strict
	$(PY) -m mypy

check-layers: $(ENVIRONMENT) ## Import directions between and inside the packages
	$(SCRIPTS)/lint-imports

check-protos: $(ENVIRONMENT) ## The committed stubs are what the .proto files generate
	$(PYTEST) -q tests/unit/test_protos.py

check-docs: $(ENVIRONMENT) ## Links, named files, settings and examples of the docs
	$(PYTEST) -q tests/unit/test_docs.py

check-spelling: $(ENVIRONMENT) ## codespell
	$(PY) -m codespell_lib $$(git ls-files)

check-repository: $(ENVIRONMENT) ## Module sizes, exports, constraints, stray paths, large files
	$(PYTEST) -q tests/unit/test_repository.py

test: test-unit test-integration ## All tests that need neither a GPU nor SGLang

test-unit: $(ENVIRONMENT) ## Unit, contract and chart tests
	$(PYTEST) -m "not integration and not gpu" -n $(TEST_WORKERS)

test-integration: $(ENVIRONMENT) ## Tests against a local Ray, a real Valkey and real weights
	$(PYTEST) -m "integration and not gpu" -n $(TEST_WORKERS) --dist loadfile --ignore=tests/integration/cluster
	$(PYTEST) -m "integration and not gpu" -n $(CLUSTER_WORKERS) --dist loadfile tests/integration/cluster

test-gpu: $(ENVIRONMENT) ## The engine's tests on a CUDA device; says so where there is none
	@$(PY) -c 'import torch; ok = torch.cuda.is_available(); print("CUDA device:", torch.cuda.get_device_name() if ok else "none; the tests will be skipped")'
	$(PYTEST) -m gpu -rs -s tests/gpu

$(SGLANG_STAMP): | $(ENVIRONMENT)
	@$(PY) -m tests.sglang.install $(SGLANG_VENV)
	@touch $@

# Replicas import this tree: Ray hands its workers the folder through PYTHONPATH.
test-sglang: $(ENVIRONMENT) $(SGLANG_STAMP) ## The real SGLang on a CPU in target replicas; some minutes, and 3 GB the first time
	SGLANG_PYTHON=$(CURDIR)/$(SGLANG_VENV)/bin/python $(PYTEST) -q -rs -s tests/sglang

protos: $(ENVIRONMENT) ## Regenerate the gRPC stubs
	PATH="$(SCRIPTS):$$PATH" $(PY) -m grpc_tools.protoc -I . \
	  --python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. protos/*.proto

reference: $(ENVIRONMENT) ## Regenerate the docs' and the chart's pages that follow the code
	$(PY) -m tests.reference
	$(PY) -m tests.module_index
	$(PY) -m tests.chart.config_schema

chart: $(ENVIRONMENT) ## Lint, render and validate the Helm chart
	$(PYTEST) -q tests/chart

demo: install ## Start a cluster here, put real prompts through it, report, stop
	$(PY) -m cluster.demo

serve: install ## The same cluster, kept running until Ctrl-C
	$(PY) -m cluster serve --prepare

plotting: $(ENVIRONMENT)
	@$(PY) -c 'import matplotlib' 2>/dev/null \
	  || $(PY) -m pip install --disable-pip-version-check -c $(CONSTRAINTS) -e '.[bench]'

bench-engine: plotting ## The embedded engine beside vLLM, OpenVINO GenAI and transformers; about 25 minutes
	$(PY) -m tests.bench.engine $(if $(QUICK),--quick)

bench-quality: $(ENVIRONMENT) ## What quantised weights cost in meaning, on a text of 22 528 tokens; about ten minutes
	$(PY) -m tests.bench.engine.quality

bench-split: plotting ## What drafts give, by source and distance, on a simulated clock and on this machine
	$(PY) -m tests.bench.split

loadtest-autoscale: plotting ## Both pools scale under 8x load, beside a cluster that is always large; 20 minutes (RATE=2 for more requests, TIME_SCALE=0.1 shortens)
	$(PY) -m tests.bench.autoscale $(if $(RATE),--rate $(RATE)) $(if $(TIME_SCALE),--time-scale $(TIME_SCALE))

bench-sglang: plotting $(SGLANG_STAMP) ## Drafts inside the real SGLang on a CPU, beside none and its own NGRAM; some ten minutes (QUICK=1: four)
	$(PY) -m tests.bench.sglang --python $(CURDIR)/$(SGLANG_VENV)/bin/python $(if $(QUICK),--quick)

bench-capacity: plotting ## Clients held at a TPOT target, drafts beside the target or in a pool, on a simulated clock
	$(PY) -m tests.bench.capacity

QUESTIONS ?= 40

bench-drafts: $(ENVIRONMENT) ## What the shipped drafts are worth on MT-bench, greedy and sampled; ten minutes for 40 questions
	$(PY) -m tests.bench.split.drafts --questions $(QUESTIONS)

shipped-card: plotting ## The shipped draft's card: its curve, and figures of `make bench-drafts QUESTIONS=80`
	$(PY) -m tests.shipped_card

bench-train: plotting ## How fast drafts are trained against this machine's limits, online and offline
	$(PY) -m tests.bench.train

bench-kv: plotting ## Codecs, Valkey and SSD beside their peers and limits; about two minutes
	$(PY) -m tests.bench.kv

bench-kv-trace: plotting ## What an SSD tier of each size would give on a public trace, beside LRU; a minute
	$(PY) -m tests.bench.kv.trace

bench-ttft: plotting ## Time to the first token by hits, from Valkey, SSD and another node; some 20 minutes (QUICK=1: one)
	$(PY) -m tests.bench.ttft $(if $(QUICK),--quick)

bench-gpu: plotting ## SGLang on one GPU: plain, its own drafts, remote drafts, and a KV tier (BENCH_GPU= more options)
	SGLANG_PYTHON=$(or $(SGLANG_PYTHON),$(if $(wildcard $(SGLANG_STAMP)),$(CURDIR)/$(SGLANG_VENV)/bin/python)) \
	  $(PY) -m tests.bench.gpu $(BENCH_GPU)

bench-gateway: plotting ## What the ingress adds to a call of the engine, beside Ray Serve's own proxy; ten minutes
	$(PY) -m tests.bench.gateway $(if $(QUICK),--quick)

loadtest: plotting ## The default model at this machine's capacity, HTTP and gRPC, beside aiperf; about 20 minutes
	$(PY) -m tests.bench.loadtest $(if $(QUICK),--quick)

SOAK_MINUTES ?= 20

soak-engine: $(ENVIRONMENT) ## The default model at twice its capacity with random aborts; 25 minutes
	$(PY) -m tests.soak.engine --minutes $(SOAK_MINUTES)

exactness: $(ENVIRONMENT) ## Speculative text against plain text on MT-bench, from every kind of draft
	$(PY) -m tests.smoke.exactness

train-smoke: $(ENVIRONMENT) ## Train a draft, kill it in every stage, check what is claimed; some minutes
	SGLANG_PYTHON=$(if $(wildcard $(SGLANG_STAMP)),$(CURDIR)/$(SGLANG_VENV)/bin/python) $(PY) -m tests.smoke.training

demo-refresh: $(ENVIRONMENT) ## A better draft takes over a serving cluster, a worse one is rolled back; some minutes
	$(PY) -m tests.smoke.refresh

CHAOS_OPERATIONS ?= 100000

chaos-kv: $(ENVIRONMENT) ## Every fault a tier or its process can have: no wrong page, no error; some minutes
	$(PY) -m tests.chaos.kv --operations $(CHAOS_OPERATIONS)

chaos-drafts: plotting ## Drafters killed, frozen, cut off and exchanged under load; some minutes
	$(PY) -m tests.chaos.drafts

FUZZ_INPUTS ?= 1000000

fuzz-kv: $(ENVIRONMENT) ## Damaged and forged pages and bytes of page servers, a million each; some minutes
	$(PY) -m tests.fuzz.kv_pages --inputs $(FUZZ_INPUTS)

fuzz-frames: $(ENVIRONMENT) ## Damaged and forged frames of the draft stream, a million of them; some minutes
	$(PY) -m tests.fuzz.frames --inputs $(FUZZ_INPUTS)

clean: ## Remove build products and caches; keeps .venv
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
