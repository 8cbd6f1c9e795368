# Everything runs from a bare clone with Python 3.11+ and a C compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TOOLS := .venv-release

# Tests and the demo run small engines: one OpenMP thread each is fastest on few cores.
export OMP_NUM_THREADS ?= 1
export VLLM_NO_USAGE_STATS = 1
# Bytecode is kept where an environment says otherwise: installed without any, vLLM is imported by a hundred processes of the tests.
export PYTHONDONTWRITEBYTECODE =
# Test processes, each with up to 4 GiB: one more than the cores of a small machine, since tests of servers wait a good deal.
WORKERS ?= 3

.PHONY: demo test nightly mutation lint format clean reference bench baselines quality claims gpu-here gpu-flow gpu-test gpu-bench
.PHONY: lock dist-check release-check licences sbom upgrade-check upgrade-test

demo: $(STAMP)
	$(BIN)/vllm-prune demo

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Hours: every shape of every test, law 3 with fresh seeds and twenty times as many histories. TESTS=... for some of them.
TESTS ?= tests
nightly: $(STAMP)
	VLLM_PRUNE_FULL=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --timeout 0 -rP $(TESTS)

# Small faults in vllm_prune/cache that tests must notice (docs/mutation.md): hours. ARGS="--sample 20" for minutes.
mutation: $(STAMP)
	$(BIN)/python tests/mutation.py --json benchmarks/results/mutation.json $(ARGS)

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
	$(BIN)/python benchmarks/ftp.py --json benchmarks/results/ftp.json
	$(BIN)/python benchmarks/prompt_forms.py --json benchmarks/results/prompt-forms.json
	$(BIN)/python benchmarks/shadow.py --json benchmarks/results/shadow.json
	$(BIN)/python benchmarks/serve.py --json benchmarks/results/serve.json
	$(BIN)/python benchmarks/prefix.py --json benchmarks/results/prefix.json
	$(BIN)/python benchmarks/sharing.py --json benchmarks/results/sharing.json
	$(BIN)/python benchmarks/storm.py --json benchmarks/results/storm.json

# The Python that has vLLM for CUDA and, by `pip install -e '.[dev]'`, this plugin: $(VENV) has vLLM for CPUs.
GPU_PYTHON ?= python3
gpu-here:
	@$(GPU_PYTHON) -c "import torch, sys; torch.cuda.is_available() or sys.exit('no GPU, or no vLLM for CUDA: give GPU_PYTHON')"

# The serve path on a GPU, start to end; with NULLGPU=DIR (whose run.sh brings a stand-in for a GPU) on a machine without one.
# CASES="dcp,v2,graphs ..." for some of them.
ifdef NULLGPU
gpu-flow: $(STAMP)
	rm -rf build/entry && mkdir -p build/entry
	cp -r $(VENV)/lib/python*/site-packages/vllm_prune-*.dist-info build/entry/
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/training:$(CURDIR)/build/entry \
	    bash $(NULLGPU)/run.sh tests/gpu/flow.py --null $(CASES)
else
gpu-flow: gpu-here
	$(GPU_PYTHON) tests/gpu/flow.py $(CASES)
endif

# On a GPU: kernels against their twins, laws 1 and 2, then half an hour of mixed load.
gpu-test: gpu-here
	mkdir -p build
	cd tests/unit/kernels && $(GPU_PYTHON) -m pytest -n 4 -p no:cacheprovider -o python_files='kernel_*.py' .
	$(GPU_PYTHON) -m pytest -n 4 --junitxml build/gpu-test.xml tests/gpu tests/integration/test_device_path.py \
	    tests/integration/test_law2_drop_sets.py -k "not borrowed and not ftp and not shadow"
	$(GPU_PYTHON) tests/gpu/soak.py --minutes 30 --json build/gpu-soak.json

# On a GPU: against stock vLLM with FlashAttention.
gpu-bench: gpu-here
	$(GPU_PYTHON) benchmarks/gpu.py --shape qwen3-8b --variants drop,stock --decode 512x8,8192x8,32768x8,40000x8 \
	    --first 8192,32768 --scarce 8192x40 --max-num-seqs 48 --new-tokens 64 --json benchmarks/results/gpu-qwen3-8b.json
	$(GPU_PYTHON) benchmarks/gpu.py --shape qwen3-8b --variants drop,stock --kv-cache-dtype fp8 --decode 8192x8,32768x8 \
	    --first 8192 --scarce 8192x40 --max-num-seqs 48 --new-tokens 64 --json benchmarks/results/gpu-qwen3-8b-fp8.json
	$(GPU_PYTHON) benchmarks/gpu_kernels.py --sweep --json benchmarks/results/gpu-kernels.json

# An environment of its own for kvpress (benchmarks/baselines/press.py), which wants an older transformers.
BASELINES := .venv-baselines
baselines: $(BASELINES)/.installed

$(BASELINES)/.installed: requirements/baselines.txt
	test -x $(BASELINES)/bin/python || $(PYTHON) -m venv $(BASELINES)
	$(BASELINES)/bin/python -m pip install -q torch==2.13.0
	$(BASELINES)/bin/python -m pip install -q -r requirements/baselines.txt
	touch $@

# Trains the reference language model and its gates again (hours on a small CPU): short texts, then long ones with tasks, then
# the corpus as Parquet, then the gates.
TASKS := "lookup","variables","niah_single_1","niah_single_2","niah_multikey_1","niah_multikey_2","niah_multikey_2"
TASKS := $(TASKS),"niah_multikey_3","variable_tracking","frequent_words"
reference: $(STAMP)
	$(BIN)/python training/reference/make_base.py --out build/reference/base-1 --minutes 50
	$(BIN)/python training/reference/make_base.py --start build/reference/base-1 --out build/reference/base --minutes 45 \
	    --set batch_tokens=8192 --set muon_lr=0.01 --set adam_lr=0.002 --set recall_share=0.6 \
	    --set 'phases=[[0.2,1024],[0.45,2048],[1.0,4096]]' --set 'names=[$(TASKS)]'
	$(BIN)/python training/reference/make_corpus.py
	training/reference/make_reference.sh

# Quality against baselines at equal kept fractions (docs/quality.md), on what `make reference` made. `claims`: over seeds.
quality: $(STAMP) baselines
	$(BIN)/python benchmarks/quality.py --model build/reference/dense-slow --json benchmarks/results/quality.json --gated \
	    DCP=build/reference/dcp-fin DMS=build/reference/dms
claims: $(STAMP)
	$(BIN)/python benchmarks/claims.py --json benchmarks/results/claims.json

# All but torch as locked, files by their hashes; then torch, from its CPU build where one is offered, by its version. (The lock
# has what torch asks for, but for CUDA's libraries.) vLLM's CPU build comes without the requirements that have none.
SOURCES := $(wildcard vllm_prune/*/*.c vllm_prune/*/*.h)
# Python compiles the fifth of these files that is ever imported by itself: to compile all of them takes a minute.
$(STAMP): requirements/ci.lock requirements/vllm-meta/pyproject.toml pyproject.toml $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile --require-hashes --no-deps -r requirements/ci.lock
	$(BIN)/python -m pip install -q --no-compile torch==2.13.0
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps ./requirements/vllm-meta
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

# Locks what requirements/*.txt and pyproject.toml ask for, anew. What is locked stays unless it must change: `make lock UP=1` takes
# the newest of everything.
LOCK := uv pip compile --quiet --config-file requirements/uv.toml --universal --python-version 3.11 --generate-hashes \
    --no-header --no-annotate $(if $(UP),--upgrade)
lock: $(TOOLS)/.installed
	$(TOOLS)/bin/$(LOCK) requirements/ci.txt pyproject.toml --extra dev --no-emit-package torch --no-emit-package torchaudio \
	    --no-emit-package torchcodec --no-emit-package torchvision -o requirements/ci.lock > /dev/null
	$(TOOLS)/bin/$(LOCK) requirements/release.txt -o requirements/release.lock > /dev/null

# Tools of a release, in an environment of their own (docs/release.md).
$(TOOLS)/.installed: requirements/release.lock
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install -q --require-hashes --no-deps -r requirements/release.lock
	mkdir -p build
	touch $@

# Wheel and sdist into build/dist, twice from two folders, compared byte for byte, and looked into.
dist-check: $(TOOLS)/.installed
	$(TOOLS)/bin/python tools/release/dist.py --out build/dist

# The wheel of build/dist in an environment of its own, away from the sources: the reference checkpoint is served.
release-check: dist-check
	$(TOOLS)/bin/python tools/release/serve_wheel.py --dist build/dist --work build/release-check

# docs/licences.md, and a list of everything that is installed in CycloneDX's form.
licences: $(STAMP) $(TOOLS)/.installed
	$(TOOLS)/bin/python tools/release/licences.py --python $(BIN)/python --out docs/licences.md
sbom: $(STAMP) $(TOOLS)/.installed
	$(TOOLS)/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible --of JSON \
	    -o build/sbom.cdx.json

# What a release of vLLM changes of what we stand on (docs/upgrade-vllm.md): make upgrade-check VLLM=0.33.0
upgrade-check: $(STAMP)
	$(BIN)/python -m tools.upgrade --release $(VLLM)
# Our tests on its Python sources with the C ops of the CPU build that we have: make upgrade-test VLLM=0.33.0 TESTS="tests/e2e ..."
TESTS ?= tests/integration tests/e2e tests/unit/ray_serve
upgrade-test: $(STAMP)
	$(BIN)/python -m tools.upgrade.on_cpu $(VLLM) $(TESTS)

clean:
	rm -rf build $(VENV) $(BASELINES) $(TOOLS)
