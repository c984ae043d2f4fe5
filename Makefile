# make demo   set everything up, then distil 16 -> 8 -> 4 -> 2 -> 1 on scikit-learn's digits (about ten minutes)
# make test   set everything up, then run the tests
# make env    only set up .venv

PYTHON ?= python3
BIN := .venv/bin

.PHONY: env demo test test-slow lint clean

env: .venv/.ready

# Python's own version is checked first: everything later would fail in stranger ways.
.venv/.ready: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + " (make PYTHON=python3.12 ...)" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@touch $@

demo: env
	$(BIN)/python distill.py --demo --outdir=runs/demo

test: env lint
	$(BIN)/python -m pytest

test-slow: env
	$(BIN)/python -m pytest -m slow

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache
