"""Attention over whole blocks gives what SDPA gives, also while a CUDA graph is recorded."""

import copy

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import import_utils

from cast_serve.trainer.attention import attend_to_whole_blocks

SIZES = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


def models(kind: str, **changes: object):
    """A model as transformers makes it, and the same with attention over whole blocks."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **changes)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    changed = copy.deepcopy(plain)
    attend_to_whole_blocks(changed)
    return plain, changed


@pytest.fixture
def masks(monkeypatch) -> list[object]:
    """The masks that SDPA is called with."""
    seen: list[object] = []
    attend = functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **options):
        seen.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    return seen


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize(
    ("kind", "changes", "masked"),
    [
        ("llama", {}, False),
        ("qwen3", {"head_dim": 16}, False),
        ("mistral", {"sliding_window": 64}, False),
        ("mistral", {"sliding_window": 8}, True),
        ("gemma3_text", {"head_dim": 16, "sliding_window": 8}, True),
        ("gpt2", {"n_inner": 64}, False),
    ],
)
def test_logits_are_those_of_sdpa(monkeypatch, masks, kind, changes, masked, recording):
    plain, changed = models(kind, **changes)
    ids = torch.randint(257, (2, 32))
    with torch.no_grad():
        expected = plain(input_ids=ids, use_cache=False).logits
        masks.clear()
        monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: recording)
        found = changed(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected)
    assert any(mask is not None for mask in masks) == masked


def test_the_name_is_not_saved(tmp_path):
    _, changed = models("llama")
    changed.save_pretrained(tmp_path)
    assert "whole_blocks" not in (tmp_path / "config.json").read_text()
