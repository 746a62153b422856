# A fresh clone needs nothing but Python and make. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := -q --disable-pip-version-check -c constraints.txt

.PHONY: install check lint test test-transformers4 test-llamacpp demo format clean

install: $(VENV)/.done

# torch comes first and by its exact version: other packages' open requirement would pull the CUDA build.
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP) torch==2.13.0
	$(BIN)/pip install $(PIP) -e '.[dev]'
	touch $@

check: lint
	$(BIN)/pytest

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Everything that must pass.
test: check

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv* .cache build *.egg-info
