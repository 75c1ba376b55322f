"""What vLLM needs outside the blocks of a model is missed, whichever tensor it is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.model_loaders.layers import find_layers
from tests.support.tiny_models import copy_with_config

DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT |= {"vocab_size": 64}
DENSE_STORED = {"quant_method": "cast", "sparsity": "2:4", "format": "dense", "version": 1}

# By the tensors that each has outside its blocks.
FAMILIES = {
    "llama": (LlamaConfig(**DECODER), 3),
    "llama-tied": (LlamaConfig(**DECODER, tie_word_embeddings=True), 2),
    "mistral": (MistralConfig(**DECODER), 3),
    "qwen2": (Qwen2Config(**DECODER), 3),
    "qwen3": (Qwen3Config(**DECODER, head_dim=8), 3),
    "phi3": (Phi3Config(**DECODER, pad_token_id=0), 3),
    "gemma2": (Gemma2Config(**DECODER, head_dim=8), 2),
    "gpt2": (GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32), 4),
    "opt": (OPTConfig(**OPT, word_embed_proj_dim=32), 4),
    "opt-norm-after": (
        OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
        4,
    ),
    "opt-no-affine": (
        OPTConfig(**OPT, word_embed_proj_dim=32, layer_norm_elementwise_affine=False),
        2,
    ),
}


@pytest.mark.parametrize(("config", "outside"), FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("tie", ["said", "by default"])
def test_each_tensor_outside_the_blocks_is_missed(
    tmp_path: Path, config: PreTrainedConfig, outside: int, tie: str
) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "saved")
    copy_with_config(tmp_path / "saved", tmp_path / "model", DENSE_STORED | {"ignore": ["lm_head"]})
    folder = tmp_path / "model"
    tied = config.tie_word_embeddings
    by_default = tie == "by default" and type(config)().tie_word_embeddings == tied
    _declare_tie(folder, None if by_default else tied)
    assert AutoConfig.from_pretrained(folder).tie_word_embeddings == tied
    find_layers(Checkpoint.open(folder))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    names = [name for name in tensors if not any(part.isdigit() for part in name.split("."))]
    assert len(names) == outside
    for name in names:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        save_file(rest, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="is missing; the checkpoint is") as caught:
            find_layers(Checkpoint.open(folder))
        assert caught.value.tensor is not None
        assert name.endswith(caught.value.tensor)


def test_what_is_outside_the_blocks_may_be_packed(tmp_path: Path) -> None:
    """compressed-tensors packs every linear; `cast-model unpack` reads them."""
    config, _ = FAMILIES["opt-norm-after"]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    packed = {
        "format": "sparse-24-bitmask",
        "sparsity_structure": "2:4",
        "targets": ["Linear"],
        "ignore": [],
    }
    quantization = {"quant_method": "compressed-tensors", "format": "dense"}
    quantization["sparsity_config"] = packed
    for name in [name for name, one in tensors.items() if one.dim() == 2 and "embed" not in name]:
        rows, columns = tensors.pop(name).shape
        module = name.removesuffix(".weight")
        tensors[f"{module}.compressed"] = torch.zeros(rows, columns // 2, dtype=torch.bfloat16)
        tensors[f"{module}.bitmask"] = torch.full((rows, columns // 8), 0x33, dtype=torch.uint8)
        tensors[f"{module}.shape"] = torch.tensor([rows, columns])
    save_file(tensors, file, metadata={"format": "pt"})
    copy_with_config(tmp_path / "model", tmp_path / "packed", quantization)
    names = {linear.name for linear in find_layers(Checkpoint.open(tmp_path / "packed")).linears}
    assert {"model.decoder.project_in", "model.decoder.project_out"} <= names


def test_a_classifier_has_no_head_for_tokens(tmp_path: Path) -> None:
    LlamaForSequenceClassification(LlamaConfig(**DECODER, pad_token_id=0)).save_pretrained(
        tmp_path / "saved"
    )
    copy_with_config(tmp_path / "saved", tmp_path / "model", DENSE_STORED | {"ignore": ["score"]})
    find_layers(Checkpoint.open(tmp_path / "model"))


def _declare_tie(folder: Path, tied: bool | None) -> None:
    """None: config.json says nothing of it."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content.pop("tie_word_embeddings", None)
    if tied is not None:
        content["tie_word_embeddings"] = tied
    file.write_text(json.dumps(content))
