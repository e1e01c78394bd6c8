# `make demo` and `make test` need nothing but Python 3.10-3.13; they set up .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt

.PHONY: setup demo test rtx lint format bench clean

setup: $(READY)

# torch comes first and pinned, so that nothing else chooses a build; timm and torchvision are only
# compared with in tests, and come without their dependencies, which would bring another torch.
$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps timm torchvision
	touch $@

demo: $(READY)
	$(BIN)/python recipes/fetch_kitchenware.py
	$(BIN)/edgex run recipes/kitchenware.yaml --out build/kitchenware

# Two workers with one thread each: half the time of one with two. Each takes one half of the tests in
# order, so that a file's tests share what they set up, and what the other has not begun when it is done.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --durations 25

# Engines of the full-size network for every GPU of TensorRT-RTX; needs none of them.
rtx: $(READY)
	$(BIN)/python recipes/fetch_kitchenware.py
	$(BIN)/pytest tests/test_kitchenware_rtx.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python recipes/fetch_kitchenware.py
	$(BIN)/python tests/benchmarks/peers.py

clean:
	rm -rf $(VENV) build .data .mypy_cache .ruff_cache
