# Two commands do all of their set-up: `make demo` and `make test`.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One line with the pins: in a second command an unpinned requirement would replace the build of torch.
TORCH := torch==2.13.0 torchvision==0.28.0

.PHONY: demo test lint format bench clean

demo: $(VENV)/.installed
	$(BIN)/fastanchor compare demo --out runs/demo

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q -n auto --dist worksteal

bench: $(VENV)/.installed
	mkdir -p runs/bench-cpu
	$(BIN)/python -m pytest -q bench --benchmark-only --benchmark-json=runs/bench-cpu/bench.json | tee runs/bench-cpu/bench.log

lint: $(VENV)/.installed
	$(BIN)/ruff check .

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH) -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps torchattacks==3.5.1
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
