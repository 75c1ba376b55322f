"""The dense-stored form in plain transformers: loads, same weights, same logits."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.model_loaders.convert import convert
from cast_serve.model_loaders.prune import prune
from cast_serve.model_loaders.summary import summarise


def llama(tied: bool) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            tie_word_embeddings=tied,
        )
    )


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=64,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


@pytest.mark.parametrize(
    ("model", "linears"),
    [
        pytest.param(lambda: llama(tied=False), 14, id="llama"),
        pytest.param(lambda: llama(tied=True), 14, id="llama-tied"),
        pytest.param(gpt2, 8, id="gpt2"),
    ],
)
def test_unpacked_loads_in_transformers(tmp_path: Path, model, linears: int) -> None:
    torch.manual_seed(0)
    model().bfloat16().save_pretrained(tmp_path / "dense")
    prune(tmp_path / "dense", tmp_path / "pruned")
    convert(tmp_path / "pruned", tmp_path / "packed", to="packed")
    convert(tmp_path / "packed", tmp_path / "unpacked", to="dense")
    assert len(summarise(Checkpoint.open(tmp_path / "packed")).sparse) == linears

    dense, pruned, unpacked = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        for name in ("dense", "pruned", "unpacked")
    )
    expected = pruned.state_dict()
    assert all(torch.equal(expected[k], v) for k, v in unpacked.state_dict().items())
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        logits = unpacked(tokens).logits
        assert torch.equal(logits, pruned(tokens).logits)
        # Pruning did something, so the equality above is not of two dense models.
        assert not torch.allclose(logits, dense(tokens).logits, atol=1e-3)
