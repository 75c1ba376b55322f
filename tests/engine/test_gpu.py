"""The example model on a GPU, with what vLLM users turn on, against stock vLLM on the same weights.

Sums are in another order than cuBLAS's, so answers are compared by vLLM's own rule
(`Answer.assert_close`).
"""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from engine_process import Answer, Engine
from features import FEATURES

from cast_serve.model_loaders.convert import convert

pytestmark = [pytest.mark.engine, pytest.mark.gpu, pytest.mark.timeout(400)]

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "tiny-llama-2of4"
COMPILED: dict[str, Any] = {"enforce_eager": False}


def graphs(mode: str) -> dict[str, Any]:
    return {**COMPILED, "compilation_config": {"cudagraph_mode": mode}}


@pytest.fixture(scope="session")
def gpu_engine(tmp_path_factory) -> Iterator[Engine]:
    log = tmp_path_factory.mktemp("gpu") / "stderr"
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCH_LOGS": "recompiles,graph_breaks",
    }
    running = Engine(log, environment)
    yield running
    running.close()


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> Path:
    """The example's weights stored dense, for stock vLLM."""
    folder = tmp_path_factory.mktemp("example") / "dense"
    convert(EXAMPLE, folder, to="dense")
    tiny_models.drop_quantization(folder)
    return folder


@pytest.fixture(scope="session")
def stock(gpu_engine, dense) -> Callable[[str], tuple[Answer, set[str]]]:
    """What stock vLLM answers, by options as JSON, and what was complained about meanwhile."""

    def ask(options: str) -> tuple[Answer, set[str]]:
        answer = gpu_engine(dense, **json.loads(options))
        return answer, complaints(gpu_engine)

    return cache(ask)


def complaints(engine: Engine) -> set[str]:
    """What torch.compile and vLLM's JIT monitor did not expect of a running engine."""
    told = ("Recompiling", "Graph break", "compilation during inference")
    return {
        line[line.index(word) :]
        for line in engine.said_while_serving().splitlines()
        for word in told
        if word in line
    }


@pytest.fixture
def answers_alike(gpu_engine, stock) -> Callable[..., Answer]:
    """Ask for a checkpoint's answer, quietly, and compare it with that of stock vLLM."""

    def check(model: Path = EXAMPLE, quantization: str | None = None, **options: Any) -> Answer:
        # First: functions of vLLM's own are compiled once a process, for whoever calls them first.
        expected, also_in_stock = stock(json.dumps(options, sort_keys=True))
        mark = len(gpu_engine.log.read_text())
        ours = {"quantization": quantization} if quantization else {}
        answer = gpu_engine(model, **ours, **options)
        log = gpu_engine.log_since(mark)
        unexpected = complaints(gpu_engine)
        answer.assert_close(expected)
        assert "stay packed" in log
        assert unexpected <= also_in_stock
        return answer

    return check


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"enforce_eager": True}, id="eager"),
        pytest.param(graphs("NONE"), id="compiled"),
        pytest.param(graphs("PIECEWISE"), id="piecewise graphs"),
        pytest.param(graphs("FULL_DECODE_ONLY"), id="full graphs"),
        pytest.param(graphs("FULL_AND_PIECEWISE"), id="full and piecewise graphs"),
        pytest.param({**COMPILED, "dtype": "float16"}, id="float16"),
        pytest.param({**COMPILED, "kv_cache_dtype": "fp8"}, id="FP8 KV cache"),
        *(pytest.param({**COMPILED, **more}, id=feature) for feature, more in FEATURES.items()),
    ],
)
def test_answers_alike(answers_alike, options):
    answers_alike(**options)


@pytest.fixture
def lora(dense, tmp_path) -> dict[str, Any]:
    """Options of an engine that answers with an adapter."""
    tiny_models.write_adapter(dense, tmp_path / "adapter")
    return {"enable_lora": True, "max_lora_rank": 8, "adapter": str(tmp_path / "adapter")}


def test_lora(answers_alike, stock, lora):
    answer = answers_alike(**COMPILED, **lora)
    assert answer.tokens != stock(json.dumps(COMPILED, sort_keys=True))[0].tokens


def test_lora_on_a_second_stream(tmp_path_factory, dense, lora):
    """vLLM then overlaps kernels of its own, beside linears that overlap theirs."""
    log = tmp_path_factory.mktemp("streams") / "stderr"
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LORA_ENABLE_DUAL_STREAM": "1"}
    streams = Engine(log, settings)
    try:
        streams(EXAMPLE, **COMPILED, **lora).assert_close(streams(dense, **COMPILED, **lora))
    finally:
        streams.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensor_parallel(tmp_path_factory, dense):
    log = tmp_path_factory.mktemp("parallel") / "stderr"
    parallel = Engine(log, {})
    options = {**COMPILED, "tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    try:
        parallel(EXAMPLE, **options).assert_close(parallel(dense, **options))
    finally:
        parallel.close()


def test_formats(answers_alike, dense, tmp_path):
    """Declared dense, declared nowhere, and as compressed-tensors."""
    answers_alike(dense, quantization="cast", **COMPILED)
    tiny_models.copy_with_config(dense, tmp_path / "stored", tiny_models.cast_config("dense", []))
    answers_alike(tmp_path / "stored", **COMPILED)
    quantization = tiny_models.compressed_tensors_config("sparse-24-bitmask")
    tiny_models.copy_with_config(dense, tmp_path / "bitmask", quantization)
    tiny_models.compress(tmp_path / "bitmask")
    answers_alike(tmp_path / "bitmask", **COMPILED)


def test_training(gpu_engine, dense, tmp_path):
    """Pruned and its scales folded in on the GPU, as `cast-model convert` does on a CPU."""
    tiny_models.write_training(dense, tmp_path / "training")
    convert(tmp_path / "training", tmp_path / "folded", to="dense")
    tiny_models.drop_quantization(tmp_path / "folded")
    expected = gpu_engine(tmp_path / "folded", **COMPILED)
    gpu_engine(tmp_path / "training", **COMPILED).assert_close(expected)


@pytest.mark.parametrize("kernel", ["mma_sp", "cusparselt"])
def test_forced_kernels(tmp_path_factory, stock, kernel):
    log = tmp_path_factory.mktemp(kernel) / "stderr"
    forced = Engine(log, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "CAST_SERVE_KERNEL": kernel})
    try:
        expected, _ = stock(json.dumps(COMPILED, sort_keys=True))
        forced(EXAMPLE, **COMPILED).assert_close(expected)
    finally:
        forced.close()
    assert f'"{kernel}"' in log.read_text()


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="kernels overlap from sm_90 on",
)
def test_generated_kernels_overlap(tmp_path_factory, tmp_path):
    """Kernels that torch.compile makes launch the linears behind them early."""
    log = tmp_path_factory.mktemp("overlap") / "stderr"
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CACHE_ROOT": str(tmp_path)}
    running = Engine(log, settings)
    try:
        running(EXAMPLE, **COMPILED)
    finally:
        running.close()
    made = [file for file in tmp_path.rglob("*.py") if "triton" in file.read_text()]
    assert any("gdc_launch_dependents" in file.read_text() for file in made)
