# Everything here works offline once the packages are installed. PYTHON may name any Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two test files at a time: most of the time is spent by single threads that import torch. In the order of folders, so that the longest begin first.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test quick soak lint clean

demo: $(STAMP)
	$(BIN)/giong demo

test: $(STAMP)
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/ruff format --check src tests examples benchmarks
	$(PYTEST)

quick: $(STAMP)
	$(PYTEST) tests/unit tests/architecture tests/parity -x

soak: $(STAMP)
	GIONG_SOAK_RECORD=tests/soak_result.json $(BIN)/python -m pytest -m soak

lint: $(STAMP)
	$(BIN)/ruff check --fix src tests examples benchmarks
	$(BIN)/ruff format src tests examples benchmarks

# Installed anew when the dependencies change; constraints.txt pins every version.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build giong-demo
