# make serve | test | test-slow | test-release | gpu-test | bench | bench-serve | lint | docs     The first call creates .venv; PYTHON=python3.12 chooses the Python.
MODEL ?= examples/tiny-llama-2of4
PORT ?= 8000
SERVE_FLAGS ?=
TEST_FLAGS ?=
BENCH_FLAGS ?=
# Processes that test at once. Each takes whole files, whose tests share engines and servers, and one
# core: more threads than cores wait for each other in PyTorch.
TEST_JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(TEST_JOBS) --dist loadfile

.PHONY: serve test test-slow test-release gpu-test bench bench-serve lint docs setup

setup:
	@scripts/setup.sh

serve: setup
	.venv/bin/cast-serve --model $(MODEL) --port $(PORT) $(SERVE_FLAGS)

test: setup
	$(PYTEST) -m "not slow" $(TEST_FLAGS)

test-slow: setup
	@scripts/triton36.sh
	CAST_SERVE_TRITON_36=$(CURDIR)/.venv/triton-3.6 $(PYTEST) -m "slow and not release" $(TEST_FLAGS)

# Before a release. Nothing runs beside them.
test-release: setup
	.venv/bin/python -m pytest -m release $(TEST_FLAGS)

# Without an NVIDIA GPU they skip, and say so.
gpu-test: setup
	.venv/bin/python -m pytest -m gpu -rs tests/kernels tests/engine tests/trainer $(TEST_FLAGS)

# Needs an NVIDIA GPU; writes bench/results and the table of kernels/README.md.
bench: setup
	.venv/bin/python -m bench.bench_linear --dtype bfloat16 $(BENCH_FLAGS)
	.venv/bin/python -m bench.bench_linear --dtype float16 $(BENCH_FLAGS)
	.venv/bin/python -m bench.render

# Needs an NVIDIA GPU; about 15 minutes. Writes bench/results and the table of README.md.
bench-serve: setup
	.venv/bin/python -m bench.bench_serve $(BENCH_FLAGS)
	.venv/bin/python -m bench.render

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/typos
	.venv/bin/python scripts/list_errors.py --check

# The documentation site, into site/; a broken link fails it.
docs: setup
	.venv/bin/mkdocs build --strict
