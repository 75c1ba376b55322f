"""A small model for the command line, made by transformers."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights, 14 linears in its blocks and an untied lm_head."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "dense"
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=48,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder
