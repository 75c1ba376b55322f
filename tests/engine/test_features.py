"""What vLLM users turn on: tensor parallelism, LoRA and torch.compile, against stock vLLM."""

from pathlib import Path

import pytest
import torch
from engine_process import Engine
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cast_serve.model_loaders.convert import convert

pytestmark = pytest.mark.engine

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def packed(stored, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features") / "packed"
    convert(stored("llama"), folder, to="packed")
    return folder


@pytest.mark.slow
def test_tensor_parallel(engine, stored, packed, tmp_path):
    """The 2:4 layers stay packed; each of two ranks holds slices of what the checkpoint has."""
    environment = {
        "CAST_SERVE_KERNEL": "reference",
        # The workers of a server: tensor parallelism needs a process a rank.
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    parallel = Engine(tmp_path / "stderr", environment)
    answer = parallel(
        packed,
        dtype="float32",
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        held=str(tmp_path),
    )
    parallel.close()
    answer.assert_equals(engine(stored("llama"), dtype="float32"))
    checkpoint = load_file(packed / "model.safetensors")
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert of_ranks[0].keys() == of_ranks[1].keys() and len(of_ranks[0]) == 2 * 4 * 2
    for name in of_ranks[0]:
        slices = [rank[name] for rank in of_ranks]
        for part, expected in whole_parts(checkpoint, name).items():
            # The ranks cut rows, but columns of what takes the rank's own outputs as inputs.
            dim = int(part in ("o_proj", "down_proj"))
            shares = [held.narrow(0, 0, expected.shape[0] // (2 - dim)) for held in slices]
            assert torch.equal(torch.cat(shares, dim=dim), expected.to(shares[0].dtype))
            slices = [held[len(share) :] for held, share in zip(slices, shares, strict=True)]
        assert all(len(held) == 0 for held in slices)


def whole_parts(checkpoint: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """What the checkpoint has of a layer's parameter, by part in the order of their rows."""
    layer, _, parameter = name.rpartition(".")
    block, _, fused = layer.rpartition(".")
    parts = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }.get(fused, (fused,))
    stored = {"weight_packed": "compressed", "metadata_0": "bitmask"}[parameter]
    return {part: checkpoint[f"{block}.{part}.{stored}"] for part in parts}


@pytest.mark.slow
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


@pytest.mark.slow
def test_torch_compile(engine, stored, packed):
    stock = engine(stored("llama"), enforce_eager=False)
    engine(packed, enforce_eager=False).assert_equals(stock)


@pytest.mark.slow
def test_dummy_weights(engine, packed):
    """Benchmarks start from random weights: the bitmasks that were never read are made up."""
    answer = engine(packed, load_format="dummy")
    assert [len(tokens) for tokens in answer.tokens] == [12, 12]
