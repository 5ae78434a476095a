# make demo   everything from nothing: environment, synthetic films, a trained and measured model
# make test   environment, lint, types, tests; the same that continuous integration runs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test setup setup-dev lint bench clean

demo: setup
	$(BIN)/python main.py demo

test: setup-dev lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/.installed-dev: requirements.txt requirements-dev.txt constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-dev.txt -c constraints.txt
	touch $@ $(VENV)/.installed

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy *.py

bench: setup
	$(BIN)/python benchmarks/training_step.py

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache demo_output
