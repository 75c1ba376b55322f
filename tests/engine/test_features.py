"""What vLLM users turn on: tensor parallelism, LoRA and torch.compile, against stock vLLM."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_process import Engine
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cast_serve.model_loaders.convert import convert

pytestmark = pytest.mark.engine

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def packed(stored, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features") / "packed"
    convert(stored("llama"), folder, to="packed")
    return folder


@pytest.fixture(scope="module")
def parallel_engine(tmp_path_factory) -> Iterator[Engine]:
    """With the workers of a server: tensor parallelism needs a process a rank."""
    log = tmp_path_factory.mktemp("parallel") / "stderr"
    running = Engine(log, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"})
    yield running
    running.close()


def test_tensor_parallel(parallel_engine, stored, packed):
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    stock = parallel_engine(stored("llama"), **options)
    parallel_engine(packed, **options).assert_equals(stock)


def test_shards_equal_slices(stored, packed, tmp_path):
    """What each of two ranks holds, beside what one rank alone does."""
    environment = {
        "CAST_SERVE_KERNEL": "reference",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    answers, holds = [], []
    for ranks, threads in ((1, "0"), (2, "0|1")):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        environment["VLLM_CPU_OMP_THREADS_BIND"] = threads
        running = Engine(folder / "stderr", environment)
        options = {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp"}
        answers.append(running(packed, held=str(folder), dtype="float32", **options))
        running.close()
        holds.append([torch.load(folder / f"{rank}.pt") for rank in range(ranks)])
    answers[1].assert_equals(answers[0])
    (whole,), shards = holds
    assert len(whole) == 2 * 4 * 2  # blocks, layers a block, values and bitmask
    for name, tensor in whole.items():
        pieces = [shard[name] for shard in shards]
        if "o_proj" in name or "down_proj" in name:
            assert torch.equal(torch.cat(pieces, dim=1), tensor)
            continue
        # Rows of a fused layer: each rank has its half of every part.
        parts = (128, 64, 64) if "qkv_proj" in name else (256, 256)
        halves = [piece.split([part // 2 for part in parts]) for piece in pieces]
        for part, *of_ranks in zip(tensor.split(parts), *halves, strict=True):
            assert torch.equal(torch.cat(of_ranks), part)


def test_lora(engine, stored, oracle, packed, tmp_path):
    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_pretrained(stored("llama"))
    # init_lora_weights=False: B starts random instead of zero, so the adapter changes the answer.
    lora = LoraConfig(r=8, target_modules=PROJECTIONS, init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    options = {"enable_lora": True, "max_lora_rank": 8, "adapter": str(tmp_path / "adapter")}
    stock = engine(stored("llama"), **options)
    assert stock.tokens != oracle("llama").tokens
    engine(packed, **options).assert_equals(stock)


def test_torch_compile(engine, stored, packed):
    stock = engine(stored("llama"), enforce_eager=False)
    engine(packed, enforce_eager=False).assert_equals(stock)


def test_dummy_weights(engine, packed):
    """Benchmarks start from random weights: the bitmasks that were never read are made up."""
    answer = engine(packed, load_format="dummy")
    assert [len(tokens) for tokens in answer.tokens] == [12, 12]
