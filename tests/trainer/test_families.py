"""Every promised family of models: its layers are chosen, trained, and written as 2:4."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cast_serve.model_loaders.check import check
from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.trainer import train
from cast_serve.trainer.evaluation.checkpoint import load_checkpoint

SIZES = {
    "vocab_size": 257,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GATED = {"intermediate_size": 64, "num_key_value_heads": 1}
LLAMA_LINEARS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"

# Model type: its own settings, and the linear layers of a block.
FAMILIES: dict[str, tuple[dict[str, object], str]] = {
    "llama": (GATED, LLAMA_LINEARS),
    "mistral": (GATED, LLAMA_LINEARS),
    "qwen2": (GATED, LLAMA_LINEARS),
    "qwen3": (GATED | {"head_dim": 16}, LLAMA_LINEARS),
    "gemma": (GATED | {"head_dim": 16}, LLAMA_LINEARS),
    "gemma2": (GATED | {"head_dim": 16}, LLAMA_LINEARS),
    "gemma3_text": (GATED | {"head_dim": 16}, LLAMA_LINEARS),
    "opt": (
        {"ffn_dim": 64, "word_embed_proj_dim": 32},
        "q_proj k_proj v_proj out_proj fc1 fc2",
    ),
    "phi3": (GATED, "qkv_proj o_proj gate_up_proj down_proj"),
    "gpt2": ({}, "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
}


@pytest.fixture
def family_dir(tokenizer, tmp_path) -> Callable[[str], Path]:
    def save(name: str) -> Path:
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **SIZES, **FAMILIES[name][0])
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("name", FAMILIES)
def test_family_trains_to_a_checkpoint_that_checks(family_dir, make_config, name):
    config = make_config(
        model=family_dir(name), steps=3, allow_short_travel=True, export="packed", dtype="float32"
    )
    train.run(config, Console(quiet=True))
    findings = list(check(Checkpoint.open(config.output)))
    assert not any(found.faulty for found in findings)
    sparse = {found.name for found in findings if found.why_dense is None}
    expected = FAMILIES[name][1].split()
    assert len(sparse) == 2 * len(expected)
    for layer in expected:
        assert sum(found.endswith(f".{layer}") for found in sparse) == 2, layer
    model = load_checkpoint(config.output, dtype=torch.float32).model
    logits = model(input_ids=torch.arange(8)[None]).logits
    assert logits.isfinite().all()
