# make serve | test | lint       The first call creates .venv; PYTHON=python3.12 chooses the Python.
MODEL ?= examples/tiny-llama-2of4
PORT ?= 8000
SERVE_FLAGS ?=

.PHONY: serve test lint setup

setup:
	@scripts/setup.sh

serve: setup
	.venv/bin/cast-serve --model $(MODEL) --port $(PORT) $(SERVE_FLAGS)

test: setup
	.venv/bin/python -m pytest $(TEST_FLAGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/typos
