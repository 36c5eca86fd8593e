# make quickstart: from a clone to trained files and pictures.  make test: the tests.  make check: lint, types, layers.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install quickstart test test-slow check format clean

help:
	@echo "make quickstart   install and train on 22 icons (a few minutes on two cores)"
	@echo "make test         install and run the tests"
	@echo "make test-slow    those that take most of a minute each"
	@echo "make check        ruff, pyright and the layer test"
	@echo "make format       let ruff format and fix"

install: .venv/installed

# Plain pins of what was tested together; pip takes them as constraints, users of the package do not inherit them.
.venv/installed: pyproject.toml requirements/tested.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint requirements/tested.txt --editable ".[dev]"
	touch $@

quickstart: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/lit-edm fit --config configs/quickstart.yaml  # so small a network does not share out well

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_layers.py

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build runs
