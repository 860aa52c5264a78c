# `make demo` and `make test` are all that a newcomer needs; each target does the set-up it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_OUT ?= runs/demo
DEMO_METHODS ?= dense topk pkm sigma-moe
DEMO_BUDGET ?= 8m
POOL ?= runs/paper
DATA_DIR ?= ptb
# Of `make gpu`: names of parts, all where there is none; the folder of packages brought along; options of `bench gpu`.
PART ?=
WHEELS ?= runs/wheels
GPU_OUT ?= results/gpu
GPU_OPTIONS ?=
# Of `make test-slow`: tests that have not begun by then are skipped, which is said; all run where there is none.
SLOW_MINUTES ?=
# Tests that run side by side in `make test`, one thread each.
JOBS ?= 2

.PHONY: help setup demo test test-slow fuzz torture lint format docs readme evidence gpu gpu-wheels clean

help:
	@echo "make demo       train parameter-equal models on the standard library's source, under 10 minutes on 2 cores"
	@echo "make test       the tests, under 8 minutes on 2 fast cores, 15 on slow ones"
	@echo "make test-slow  every combination of what the tests sample, under 30 minutes"
	@echo "make fuzz       ten minutes of random shapes on the compiled kernels"
	@echo "make torture    under 30 minutes: runs are killed, disks filled and files damaged at random; what was lost"
	@echo "make lint       formatting, lint, types, spelling, generated text"
	@echo "make format     format the code and fix what ruff can fix"
	@echo "make docs       the documentation: build it strictly, serve it at http://127.0.0.1:8000"
	@echo "make readme     write the generated tables of the README and of docs/ anew"
	@echo "make evidence   results/evidence/ and docs/results.md from the runs of POOL, on Penn Treebank in DATA_DIR"
	@echo "make gpu        measure on a CUDA device, in parts of under 8 minutes, into results/gpu; goes on where it stopped"
	@echo "                PART=layer-bf16 for one part, PYTHON=python3 for the interpreter, WHEELS=FOLDER for packages"
	@echo "make gpu-wheels where there is a network: the packages that a machine with PyTorch alone lacks, into WHEELS"
	@echo "make setup      the virtual environment alone"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/sparseffn compare --methods $(DEMO_METHODS) --budget $(DEMO_BUDGET) --out $(DEMO_OUT)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -m slow $(if $(SLOW_MINUTES),--minutes $(SLOW_MINUTES))

fuzz: setup
	$(BIN)/python tests/ops/cpu_backend/fuzz_kernels.py --minutes 10 --poison

torture: setup
	$(BIN)/python tools/torture

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/codespell src tests tools docs examples mkdocs.yml README.md CHANGELOG.md CITATION.cff CONTRIBUTING.md
	$(BIN)/python tools/generated.py --check

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The theme advertises its successor otherwise. `make test` builds the site strictly too.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "at http://127.0.0.1:8000 until you press Ctrl-C"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --quiet --strict --dev-addr 127.0.0.1:8000

readme: setup
	$(BIN)/python tools/generated.py

# Made from the pool: results/evidence/ and the generated blocks of docs/results.md. LaTeX, HTML and their index are not kept.
evidence: setup
	$(BIN)/sparseffn reproduce evidence --list --pool $(POOL) --data-dir $(DATA_DIR) --out results/evidence \
		--bench results/bench-layer-paper-2-cores.json
	rm -f results/evidence/*.tex results/evidence/*.html results/evidence/tables.md
	$(BIN)/python tools/generated.py docs/results.md

# Runs from the source tree, without installing; the machine needs no network.
gpu:
	PYTHONPATH=src:$(WHEELS) $(PYTHON) -m sparseffn bench gpu --out $(GPU_OUT) $(if $(PART),--parts $(PART)) $(GPU_OPTIONS)

# For Python 3.12 on Linux x86_64; PyTorch, Triton, NumPy, rich, Jinja and the like are there already.
gpu-wheels:
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	  --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -c constraints.txt -d $(WHEELS) \
	  msgspec tyro docstring-parser typeguard
	for wheel in $(WHEELS)/*.whl; do $(PYTHON) -m zipfile -e $$wheel $(WHEELS); done

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
