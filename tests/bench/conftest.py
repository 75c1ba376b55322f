from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cast_serve.bench.linear_results import Results, Row, roof_us, sparse_bytes
from cast_serve.bench.shapes import MODELS, TOKENS

COPY_GBPS, DENSE_TFLOPS = 4000.0, 800.0


def make_env(run: str) -> dict[str, Any]:
    return {
        "run": run,
        "gpu": "NVIDIA H200",
        "driver": "580.1",
        "cuda": "13.0",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "cusparselt": "0.8.0",
        "commit": "0123456789ab",
        "copy_gbps": COPY_GBPS,
        "dense_tflops": DENSE_TFLOPS,
    }


def make_row(**changes: Any) -> Row:
    """A row at 80 % of its roof, 1.25 times as fast as dense unless told otherwise."""
    entry: dict[str, Any] = {
        "model": "Llama-3.1-8B",
        "layer": "qkv",
        "N": 6144,
        "K": 4096,
        "M": 16,
        "dtype": "bfloat16",
        "kernel": "mma_sp",
        "config": "r128",
        "selected": True,
        "dense_iqr_us": 0.2,
        "sparse_iqr_us": 0.1,
        "copy_gbps": COPY_GBPS,
        "dense_tflops": DENSE_TFLOPS,
        "host_us": 9.0,
        "resident": 0.5625,
        "workspace_bytes": 0,
        "run": "one",
    } | changes
    shape = {key: entry[key] for key in ("N", "K", "M")}
    roof = roof_us(**shape, copy_gbps=COPY_GBPS, dense_tflops=DENSE_TFLOPS)
    entry.setdefault("sparse_us", roof / 0.8)
    entry.setdefault("dense_us", 1.25 * entry["sparse_us"])
    entry.setdefault("gbps", sparse_bytes(**shape) / entry["sparse_us"] / 1e3)
    return Row(**entry)


@pytest.fixture
def row() -> Callable[..., Row]:
    return make_row


@pytest.fixture
def env() -> Callable[[str], dict[str, Any]]:
    return make_env


@pytest.fixture
def results() -> Results:
    """Two models at every M: mma_sp up to 64 tokens, wgmma_sp above."""
    rows = [
        make_row(
            model=model.name,
            layer=layer.name,
            N=layer.N,
            K=layer.K,
            M=M,
            kernel="mma_sp" if M <= 64 else "wgmma_sp",
        )
        for model in MODELS[:2]
        for layer in model.layers
        for M in TOKENS
    ]
    forced = make_row(M=64, kernel="cusparselt", selected=False)
    return Results().merge(make_env("one"), [*rows, forced])


@pytest.fixture
def result_file(results: Results, tmp_path: Path) -> Path:
    path = tmp_path / "linear-h200.json"
    results.save(path)
    return path
