# Each target sets up what it needs in .venv, on a machine with nothing but Python 3.10 or newer.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test quick test-timm lint format

# Each time into a folder of its own.
demo: .venv/installed
	$(BIN)/timm-msar demo --output demo-$$(date +%Y%m%d-%H%M%S)

# One thread a process: the tests are many small networks, and PyTorch's threads get in each other's way.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# Without the slow tests, for a developer at work.
quick: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m 'not slow'

# timm's own test file on every network, four minutes.
test-timm: .venv/installed
	TIMM_MSAR_ALL_NETWORKS=1 $(BIN)/pytest tests/test_timm_suite.py

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.venv/installed: pyproject.toml timm_msar_command.py  # which even an editable install copies
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[test,lint]'
	touch $@
