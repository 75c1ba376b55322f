"""cast_serve::linear_2of4 under the real engine: on a CPU with its fp32 reference as the kernel."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from engine_process import Answer, Engine, EngineError
from features import FEATURES

from cast_serve.model_loaders.convert import convert

pytestmark = pytest.mark.engine

SPARSE = {"CAST_SERVE_KERNEL": "reference", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@pytest.fixture(scope="module")
def sparse_engine(tmp_path_factory) -> Iterator[Engine]:
    """An engine whose 2:4 layers stay packed."""
    folder = tmp_path_factory.mktemp("sparse")
    running = Engine(folder / "stderr", SPARSE)
    yield running
    running.close()


@pytest.fixture(scope="module")
def packed(stored, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sparse") / "packed"
    convert(stored("llama"), folder, to="packed")
    return folder


@pytest.fixture(scope="module")
def float32(engine, stored) -> Callable[[str], Answer]:
    """What stock vLLM answers in float32, where the order of sums does not show."""
    return cache(lambda architecture: engine(stored(architecture), dtype="float32"))


def test_sparse_op(sparse_engine, float32, packed):
    mark = len(sparse_engine.log.read_text())
    sparse_engine(packed, dtype="float32").assert_equals(float32("llama"))
    # gate_up_proj of both blocks: a shape is named once.
    said = '2:4 layers [512, 128] stay packed: [[null, "reference", "fp32"]]'
    assert sparse_engine.log_since(mark).count(said) == 1


def test_sparse_op_in_bfloat16(sparse_engine, oracle, packed):
    """Greedy tokens only: the reference rounds once, oneDNN does not."""
    assert sparse_engine(packed).tokens == oracle("llama").tokens


@pytest.mark.slow
def test_sparse_op_compiled(sparse_engine, float32, packed):
    answer = sparse_engine(packed, dtype="float32", enforce_eager=False)
    answer.assert_equals(float32("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("feature", [name for name in FEATURES if name != "speculative decoding"])
def test_sparse_op_with(sparse_engine, engine, stored, packed, feature):
    options = {"dtype": "float32", **FEATURES[feature]}
    answer = sparse_engine(packed, **options)
    answer.assert_equals(engine(stored("llama"), **options))
    assert (sum(answer.cached_tokens) > 0) == (feature == "prefix caching")


@pytest.mark.slow
def test_sparse_op_with_speculative_decoding(engine, stored, packed, tmp_path):
    """In a process of its own: n-grams load numba, with which vLLM 0.32 for CPUs starts no second
    engine. Stock vLLM answers without: what is guessed changes no greedy token."""
    options = {"dtype": "float32", **FEATURES["speculative decoding"]}
    sparse = Engine(tmp_path / "stderr", SPARSE)
    answer = sparse(packed, **options)
    sparse.close()
    del options["speculative_config"]
    answer.assert_equals(engine(stored("llama"), **options))


@pytest.mark.slow
def test_sparse_op_with_bias(sparse_engine, float32, stored, tmp_path):
    convert(stored("opt"), tmp_path / "packed", to="packed")
    sparse_engine(tmp_path / "packed", dtype="float32").assert_equals(float32("opt"))


@pytest.mark.slow
def test_gpu_kernel_on_a_cpu(packed, tmp_path):
    environment = {"CAST_SERVE_KERNEL": "mma_sp", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    running = Engine(tmp_path / "stderr", environment)
    with pytest.raises(EngineError, match="CAST_SERVE_KERNEL=mma_sp needs a GPU"):
        running(packed)
    running.close()
