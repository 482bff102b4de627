# Everything runs in a virtual environment that the first target makes: Python, make and a C++ compiler are enough.
#   make test PYTEST_ARGS="-k padding -x"     make lint VENV=/some/other/venv     make demo PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.installed
# One torch thread per worker, so that they do not fight for the cores; and no test may reach for the Hub unasked. A worker
# that has done its share takes half of what the other has left: files stay together but for a few, and both end at once.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
# constraints.txt pins the oldest transformers that is supported, and the newest that peft knows; this is the newest.
NEWEST := transformers==5.24.0
MEET_TRANSFORMERS := compat full_attention generation heads hub pipelines registration save_load seq2seq trainer
MEET_FILES = $(foreach name,$(MEET_TRANSFORMERS),$(or $(wildcard tests/test_$(name).py tests/*/test_$(name).py),\
    $(error MEET_TRANSFORMERS names $(name), and there is no tests/*/test_$(name).py)))

.DEFAULT_GOAL := help
.PHONY: help demo demo-speech demo-image demo-forecast test test-slow test-notebooks test-newest lint format bench bench-gpu \
    evidence-short docs dist clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# torch first and pinned: nothing that depends on it may choose another. pip would compile to bytecode on one core; a few files
# are templates, or for other versions of Python, and cannot be compiled.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

demo: $(READY) ## train a small classifier end to end, without a download
	$(BIN)/python scripts/train_classification.py --demo --output_dir runs/demo $(DEMO_ARGS)

demo-speech: $(READY) ## train a small speech recognizer on made-up words
	$(BIN)/python scripts/train_speech_recognition.py --demo --output_dir runs/demo-speech $(DEMO_ARGS)

demo-image: $(READY) ## train a small classifier of handwritten digits
	$(BIN)/python scripts/train_image_classification.py --demo --output_dir runs/demo-image $(DEMO_ARGS)

demo-forecast: $(READY) ## forecast the made-up load of a grid
	$(BIN)/python scripts/train_forecasting.py --demo --output_dir runs/demo-forecast $(DEMO_ARGS)

test: $(READY) ## run the fast tests
	$(PYTEST) $(PYTEST_ARGS)

test-slow: $(READY) ## run the slow tests
	$(PYTEST) -m "slow and not network" $(PYTEST_ARGS) || test $$? -eq 5  # 5: there is none

test-notebooks: $(READY) ## run the notebooks
	$(PYTEST) --nbmake notebooks $(PYTEST_ARGS)

# Everything else that is installed stays as it is.
test-newest: $(READY) ## run the tests that meet transformers with its newest release
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/newest $(NEWEST)
	PYTHONPATH=$(abspath $(VENV))/newest $(PYTEST) $(MEET_FILES) $(PYTEST_ARGS)

lint: $(READY) ## check style, imports between rooms, and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=src $(BIN)/lint-imports
	$(BIN)/mypy

format: $(READY) ## put style right, where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## measure against other implementations, in ten minutes
	$(BIN)/python -m benchmarks.run --short --append $(BENCH_ARGS)

bench-gpu: $(READY) ## check and measure on one GPU, within six minutes; BENCH_ARGS="--device cpu --tiny" tries it on a CPU
	$(BIN)/python -m benchmarks.gpu $(BENCH_ARGS)

EVIDENCE := attention_variants exact_then_windows bucket_balance recall duplication listops classification \
    reversible_and_shared step_time defaults
evidence-short: $(READY) ## run every experiment of docs/evidence.md in a tiny version, in some minutes
	set -e; for name in $(EVIDENCE); do $(BIN)/python experiments/$$name.py --short; done

docs: $(READY) ## build the documentation site into build/site; a warning is an error
	$(BIN)/zensical build --strict --clean

dist: $(READY) ## build sdist and wheel, check them, and try the wheel in an empty environment; HF_REFORMER_PREBUILT=1: with kernels
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python dev/try_wheel.py dist/*.whl

clean: ## remove build products and caches; the virtual environment and runs/ stay
	rm -rf build dist src/*.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name site-packages -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
