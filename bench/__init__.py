"""Benchmarks; run from the checkout, as `python -m bench.bench_linear`."""
