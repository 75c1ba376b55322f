"""Every format answers as stock vLLM does on the same weights stored dense."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from engine_process import EngineError
from engine_worker import PROMPTS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cast_serve.model_loaders.convert import convert
from cast_serve.model_loaders.quantize import quantize

pytestmark = pytest.mark.engine


def test_packed(engine, stored, oracle, tmp_path):
    convert(stored("llama"), tmp_path / "packed", to="packed")
    engine(tmp_path / "packed").assert_equals(oracle("llama"))


def test_transformers_agrees(engine, stored, tmp_path):
    """What `unpack` writes, under plain transformers, against the packed form under vLLM."""
    convert(stored("llama"), tmp_path / "packed", to="packed")
    convert(tmp_path / "packed", tmp_path / "unpacked", to="dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked", dtype=torch.float32)
    answer = engine(tmp_path / "packed", dtype="float32")
    for prompt, tokens, logprobs in zip(PROMPTS, answer.tokens, answer.logprobs, strict=True):
        with torch.inference_mode():
            scores = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
        # The score at a position predicts the next one.
        predicted = scores[len(prompt) - 1 : -1]
        assert predicted.argmax(-1).tolist() == tokens
        assert predicted.max(-1).values.tolist() == pytest.approx(logprobs, abs=1e-3)


def test_dense_declared(engine, stored, oracle, tmp_path):
    tiny_models.copy_with_config(
        stored("llama"), tmp_path / "dense", tiny_models.cast_config("dense", ["lm_head"])
    )
    engine(tmp_path / "dense").assert_equals(oracle("llama"))


def test_dense_with_flag(engine, stored, oracle):
    engine(stored("llama"), quantization="cast").assert_equals(oracle("llama"))


def test_compressed_tensors_bitmask(engine, stored, oracle, tmp_path):
    quantization = tiny_models.compressed_tensors_config("sparse-24-bitmask")
    tiny_models.copy_with_config(stored("llama"), tmp_path / "ct", quantization)
    tiny_models.compress(tmp_path / "ct")
    engine(tmp_path / "ct").assert_equals(oracle("llama"))


def test_compressed_tensors_dense(engine, stored, oracle, tmp_path):
    quantization = tiny_models.compressed_tensors_config("dense")
    tiny_models.copy_with_config(stored("llama"), tmp_path / "ct", quantization)
    engine(tmp_path / "ct").assert_equals(oracle("llama"))


def test_training(engine, stored, tmp_path):
    tiny_models.write_training(stored("llama"), tmp_path / "training")
    convert(tmp_path / "training", tmp_path / "folded", to="dense")
    folded = engine(tmp_path / "folded", quantization=None)
    engine(tmp_path / "training").assert_equals(folded)


@pytest.mark.parametrize(
    ("architecture", "to"),
    [("llama", "fp8"), pytest.param("gpt2", "int8", marks=pytest.mark.slow)],
)
def test_quantized(engine, stored, tmp_path, architecture, to):
    """Dequantized while loading: as stock vLLM on what `unpack` makes of it."""
    quantize(stored(architecture), tmp_path / "quantized", to=to)
    convert(tmp_path / "quantized", tmp_path / "dense", to="dense")
    dense = engine(tmp_path / "dense", quantization=None)
    engine(tmp_path / "quantized").assert_equals(dense)


@pytest.mark.parametrize(
    "architecture",
    [
        "gpt2",
        *(pytest.param(a, marks=pytest.mark.slow) for a in ("qwen3", "mistral", "opt", "phi3")),
    ],
)
def test_architecture(engine, stored, oracle, tmp_path, architecture):
    convert(stored(architecture), tmp_path / "packed", to="packed")
    engine(tmp_path / "packed").assert_equals(oracle(architecture))


def test_architecture_with_flag_gpt2(engine, stored, oracle):
    """The one architecture that stores its weights [in, out]."""
    engine(stored("gpt2"), quantization="cast").assert_equals(oracle("gpt2"))


def set_dense(folder: Path, parts: list[str], weights: Path) -> None:
    """Store `parts` of the packed checkpoint `folder` dense, and ignore them."""
    file = folder / "model.safetensors"
    tensors, dense = load_file(file), load_file(weights / "model.safetensors")
    for part in parts:
        for suffix in ("compressed", "bitmask", "shape"):
            del tensors[f"{part}.{suffix}"]
        tensors[f"{part}.weight"] = dense[f"{part}.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] += parts
    (folder / "config.json").write_text(json.dumps(config))


def test_mixed_fused_layer(engine, stored, oracle, tmp_path):
    convert(stored("llama"), tmp_path / "mixed", to="packed")
    parts = [f"model.layers.{layer}.self_attn.k_proj" for layer in (0, 1)]
    set_dense(tmp_path / "mixed", parts, stored("llama"))
    mark = len(engine.log.read_text())
    engine(tmp_path / "mixed").assert_equals(oracle("llama"))
    log = engine.log_since(mark)
    assert log.count("runs dense:") == 1
    assert "model.layers.0.self_attn.qkv_proj runs dense: model.layers.0.self_attn.q_proj" in log


def test_mixed_fused_layer_with_flag(engine, stored, tmp_path):
    """Nothing declares which linears are 2:4: up_proj turns out not to be after gate_proj was."""
    folder = tmp_path / "mixed"
    tiny_models.copy_with_config(stored("llama"), folder, {})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] += 0.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    dense = engine(folder)
    mark = len(engine.log.read_text())
    engine(folder, quantization="cast").assert_equals(dense)
    assert engine.log_since(mark).count("runs dense:") == 1


def damage_nan(tensors: dict) -> str:
    name = "model.layers.1.mlp.down_proj.compressed"
    tensors[name][3, 5] = float("nan")
    return name


def damage_bits(tensors: dict) -> str:
    name = "model.layers.0.self_attn.v_proj.bitmask"
    tensors[name][2, 1] = 0b0111_0011
    return name


def damage_missing(tensors: dict) -> str:
    for suffix in ("compressed", "bitmask", "shape"):
        del tensors[f"model.layers.1.self_attn.o_proj.{suffix}"]
    return "model.layers.1.self_attn.o_proj"


@pytest.mark.parametrize("damage", [damage_nan, damage_bits, damage_missing])
def test_damaged_packed(engine, stored, tmp_path, damage: Callable[[dict], str]):
    convert(stored("llama"), tmp_path / "damaged", to="packed")
    file = tmp_path / "damaged" / "model.safetensors"
    tensors = load_file(file)
    name = damage(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(EngineError) as raised:
        engine(tmp_path / "damaged")
    assert name in str(raised.value)


def test_damaged_beside_dense(engine, stored, tmp_path):
    """q_proj is dense though nothing says so, k_proj has a row of zeros where its bitmask was."""
    folder = tmp_path / "mixed"
    quantization = tiny_models.compressed_tensors_config("sparse-24-bitmask")
    tiny_models.copy_with_config(stored("llama"), folder, quantization)
    tiny_models.compress(folder)
    tensors = load_file(folder / "model.safetensors")
    attention = "model.layers.0.self_attn"
    for suffix in ("compressed", "bitmask", "shape"):
        del tensors[f"{attention}.q_proj.{suffix}"]
    tensors[f"{attention}.q_proj.weight"] = torch.ones(128, 128, dtype=torch.bfloat16)
    tensors[f"{attention}.k_proj.bitmask"][3] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError) as raised:
        engine(folder)
    assert f"{attention}.k_proj.bitmask" in str(raised.value)


def test_damaged_dense(engine, stored, tmp_path):
    tiny_models.copy_with_config(
        stored("llama"), tmp_path / "dense", tiny_models.cast_config("dense", ["lm_head"])
    )
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.gate_proj.weight"
    tensors[name][7, 8:12] = 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(EngineError, match="row 7, columns 8-11") as raised:
        engine(tmp_path / "dense")
    assert f"{file}: {name}: " in str(raised.value)
