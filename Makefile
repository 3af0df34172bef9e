# Two commands from a fresh clone: `make demo` and `make test`. Needs Python 3.11 or newer with pip and venv, and make.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= sharpscope-demo
BITMAPS ?= .glyph/bitmaps.npz

.PHONY: demo test lint types format environment rivals bench study notebooks docs clean

environment:
	@$(PYTHON) .ci/environment.py

demo: environment
	$(BIN)/sharpscope demo --out $(OUT)

test: lint types
	SHARPSCOPE_RIVALS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile
	PYTHONPATH=.libraries OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile tests/libraries

rivals: environment

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: environment
	$(BIN)/mypy

format: environment
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: environment
	$(BIN)/python benchmarks/layerwise.py --size tiny

# From the stored rows; RETRAIN=1 makes those anew first, on a GPU, from the bitmaps that benchmarks/glyph makes.
study: environment
ifdef RETRAIN
	PYTHONPATH=benchmarks/glyph:benchmarks/study $(BIN)/python benchmarks/study/retrain.py $(BITMAPS) .study benchmarks/results/study
endif
	$(BIN)/python benchmarks/study/study.py

notebooks: environment
	$(BIN)/python tests/notebooks.py

docs: environment
	$(BIN)/python docs/reference.py build/docs

clean:
	rm -rf .venv .venv.lock .libraries build dist *.egg-info
