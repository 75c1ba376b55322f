from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cast_serve.bench.serving.client import Measurement
from cast_serve.bench.serving.results import Results, Row
from cast_serve.bench.serving.server import Startup
from cast_serve.bench.serving.workloads import WORKLOADS, find_workloads


def make_env(run: str = "one", gpu: str = "NVIDIA H200") -> dict[str, Any]:
    return {
        "run": run,
        "gpu": gpu,
        "driver": "580.1",
        "cpu": "a processor, 16 cores",
        "cuda": "13.0",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "vllm": "0.26.0",
        "commit": "0123456789ab",
    }


def make_measurement(scale: float = 1.0, *, decodes: bool = True) -> Measurement:
    """Times that are `scale` of 20 ms and 5 ms, and as much less throughput."""
    return Measurement(
        ttft_ms=20 * scale,
        ttft_p99_ms=40 * scale,
        ttft_mean_ms=24 * scale,
        ttft_engine_ms=16 * scale,
        tpot_ms=5 * scale if decodes else None,
        tpot_p99_ms=6 * scale if decodes else None,
        output_tokens_per_s=1000 / scale,
    )


def make_row(
    engine: str = "sparse-bf16",
    workload: str = "c1",
    scales: tuple[float, ...] = (1.0,),
    *,
    model: str = "Llama-3.1-8B",
    run: str = "one",
    flags: tuple[str, ...] = (),
) -> Row:
    (found,) = find_workloads(workload)
    sparse = engine == "sparse-bf16"
    return Row.of(
        engine=engine,
        model=model,
        workload=found,
        measured=[make_measurement(scale, decodes=not found.is_prefill) for scale in scales],
        startup=Startup(
            weights_gib=9.34 if sparse else 14.99, load_s=1.5, kv_tokens=440000 + 40000 * sparse
        ),
        start_s=42.0,
        flags=flags,
        run=run,
    )


@pytest.fixture
def env() -> Callable[..., dict[str, Any]]:
    return make_env


@pytest.fixture
def measurement() -> Callable[..., Measurement]:
    return make_measurement


@pytest.fixture
def row() -> Callable[..., Row]:
    return make_row


@pytest.fixture
def results() -> Results:
    """Every workload: 2:4 takes 0.75 of dense bf16's time, FP8 0.6."""
    rows = [
        make_row(engine, workload.name, (scale,))
        for workload in WORKLOADS
        for engine, scale in (("dense-bf16", 1.0), ("dense-fp8", 0.6), ("sparse-bf16", 0.75))
    ]
    return Results().merge(make_env(), rows)


@pytest.fixture
def result_file(results: Results, tmp_path: Path) -> Path:
    path = tmp_path / "serve-h200.json"
    results.save(path)
    return path
