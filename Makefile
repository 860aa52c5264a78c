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

.PHONY: help setup demo test test-slow fuzz lint format readme evidence clean

help:
	@echo "make demo       train parameter-equal models on the standard library's source, under 10 minutes on 2 cores"
	@echo "make test       the tests, under 8 minutes on 2 cores"
	@echo "make test-slow  every combination of what the tests sample, under 30 minutes"
	@echo "make fuzz       ten minutes of random shapes on the compiled kernels"
	@echo "make lint       formatting, lint, types, spelling, generated text"
	@echo "make format     format the code and fix what ruff can fix"
	@echo "make readme     write the generated tables of the README and of docs/ anew"
	@echo "make evidence   results/evidence/ and docs/results.md from the runs of POOL, on Penn Treebank in DATA_DIR"
	@echo "make setup      the virtual environment alone"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/sparseffn compare --methods $(DEMO_METHODS) --budget $(DEMO_BUDGET) --out $(DEMO_OUT)

test: setup
	$(BIN)/python -m pytest -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -m slow

fuzz: setup
	$(BIN)/python tools/fuzz_kernels.py --minutes 10 --poison

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/codespell src tests tools docs README.md CHANGELOG.md CITATION.cff CONTRIBUTING.md
	$(BIN)/python tools/generated.py --check

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

readme: setup
	$(BIN)/python tools/generated.py

# Made from the pool: results/evidence/ and the generated blocks of docs/results.md. LaTeX, HTML and their index are not kept.
evidence: setup
	$(BIN)/sparseffn reproduce evidence --list --pool $(POOL) --data-dir $(DATA_DIR) --out results/evidence \
		--bench results/bench-layer-paper-2-cores.json
	rm -f results/evidence/*.tex results/evidence/*.html results/evidence/tables.md
	$(BIN)/python tools/generated.py docs/results.md

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
