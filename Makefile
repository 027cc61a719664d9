# Two commands for a newcomer: `make demo` and `make test`. Both build .venv once and reuse it.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo test test-all lint benchmark clean

demo: $(READY)
	$(VENV)/bin/lightning-memopt demo $(DEMO_ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal --nbmake -m "not slow" $(PYTEST_ARGS) tests notebooks

test-all: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal --nbmake $(PYTEST_ARGS) tests notebooks

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

benchmark: $(READY)
	$(VENV)/bin/python benchmarks/single_device.py
	$(VENV)/bin/python benchmarks/tables.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
