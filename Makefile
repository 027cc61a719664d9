# Two commands for a newcomer: `make demo` and `make test`. Both build .venv once and reuse it.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest
# Tests marked `distributed` fork their ranks from the process they run in, which is safe only while no other test has
# started threads in it: no workers of xdist, but two processes, since ranks wait for each other half of the time.
OTHERS := -n 2 --dist worksteal --nbmake
# First, since it takes longest; the others are run before a release.
QUICK_NOTEBOOK := notebooks/01_quickstart.ipynb

.PHONY: demo test test-strategies test-ranks test-all lint parity benchmark clean

demo: $(READY)
	$(VENV)/bin/lightning-memopt demo $(DEMO_ARGS)

test: $(READY)
	$(MAKE) --no-print-directory -j2 test-strategies test-ranks
	$(PYTEST) -m "not distributed and not slow" $(PYTEST_ARGS) $(OTHERS) $(QUICK_NOTEBOOK) tests

test-strategies: $(READY)
	$(PYTEST) -m "distributed and not slow" $(PYTEST_ARGS) tests/strategies

test-ranks: $(READY)
	$(PYTEST) -m "distributed and not slow" $(PYTEST_ARGS) --ignore=tests/strategies tests

test-all: $(READY)
	$(PYTEST) -m distributed $(PYTEST_ARGS) tests
	$(PYTEST) -m "not distributed" $(PYTEST_ARGS) $(OTHERS) notebooks tests

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Every module of the zoo under every strategy: about half an hour.
parity: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.strategies.parity_matrix
	$(VENV)/bin/python benchmarks/tables.py

benchmark: $(READY)
	$(VENV)/bin/python benchmarks/single_device.py
	$(VENV)/bin/python benchmarks/tables.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
