"""Tiny random models with 2:4 weights, and the formats that are read but not written."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from cast_serve.kernels.pattern import nm_mask

VOCABULARY = 512
# 0.2 rather than 0.02: with larger weights the logits differ enough for greedy ties not to matter.
SPREAD = 0.2
# 32 is the smallest head that vLLM's CPU attention takes.
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": SPREAD,
    "eos_token_id": 0,
    "bos_token_id": 0,
}


def configuration(architecture: str) -> PreTrainedConfig:
    match architecture:
        case "llama":
            return LlamaConfig(**_DECODER)
        case "qwen3":
            return Qwen3Config(**_DECODER)
        case "mistral":
            return MistralConfig(**_DECODER, sliding_window=None)
        case "phi3":
            # Stores q, k, v and gate, up as one matrix each.
            return Phi3Config(**_DECODER, pad_token_id=0)
        case "opt":
            return OPTConfig(
                vocab_size=VOCABULARY,
                hidden_size=128,
                word_embed_proj_dim=128,
                ffn_dim=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=256,
                init_std=SPREAD,
            )
        case "gpt2":
            return GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=128,
                n_layer=2,
                n_head=4,
                n_positions=256,
                initializer_range=SPREAD,
                eos_token_id=0,
                bos_token_id=0,
            )
    raise ValueError(architecture)


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    """The weights of the transformer blocks that are matrices."""
    return tensor.dim() == 2 and name.endswith(".weight") and (".layers." in name or ".h." in name)


def write_stored(architecture: str, folder: Path) -> None:
    """A random model in bfloat16 whose linears are 2:4 along their inputs, and a tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(architecture)).to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                # Initialised to ones and zeros, which would hide a bias that is not added.
                weight.add_(torch.randn_like(weight) * 0.1)
            elif is_linear(name, weight):
                # GPT-2 stores [in, out].
                rows = weight.t() if architecture == "gpt2" else weight
                rows.mul_(nm_mask(rows.contiguous()))
    model.save_pretrained(folder)
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=["<eos>"]
    )
    tokenizer.train_from_iterator(["it was a fine day and the sun was out"] * 9, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        bos_token="<eos>",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    ).save_pretrained(folder)


def copy_with_config(source: Path, target: Path, quantization: dict) -> None:
    """A copy of `source` whose config.json has `quantization` as its quantization_config."""
    shutil.copytree(source, target)
    file = target / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": quantization}))


def drop_quantization(folder: Path) -> None:
    """Declare nothing in config.json, so that stock vLLM serves the folder."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.pop("quantization_config", None)
    file.write_text(json.dumps(config))


def write_adapter(base: Path, folder: Path, rank: int = 8) -> None:
    """A random LoRA adapter on all linears of a Llama in one dense file, as peft saves it."""
    torch.manual_seed(2)
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if is_linear(name, weight):
            module = "base_model.model." + name.removesuffix(".weight")
            rows, columns = weight.shape
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, columns) / columns**0.5
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank) / rank**0.5
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    projections = {name.split(".")[-3] for name in tensors}
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(projections),
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter))


def cast_config(stored: str, ignore: list[str]) -> dict:
    return {
        "quant_method": "cast",
        "format": stored,
        "sparsity": "2:4",
        "ignore": ignore,
        "version": 1,
    }


def compressed_tensors_config(stored: str) -> dict:
    """As llm-compressor 0.8 writes it."""
    return {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "ignore": [],
        "quantization_status": "compressed",
        "sparsity_config": {
            "format": stored,
            "global_sparsity": 0.5,
            "ignore": ["lm_head"],
            "registry_requires_subclass": False,
            "sparsity_structure": "2:4",
            "targets": ["Linear"],
        },
    }


def compress(folder: Path) -> None:
    """Rewrite the linears of `folder` as compressed-tensors 0.14 does, a bit at a time."""
    file = folder / "model.safetensors"
    tensors = {}
    for name, weight in load_file(file).items():
        if not is_linear(name, weight):
            tensors[name] = weight
            continue
        module = name.removesuffix(".weight")
        rows, columns = weight.shape
        kept = nm_mask(weight)
        bits = kept.reshape(rows, columns // 8, 8).int()
        tensors[f"{module}.compressed"] = weight[kept].reshape(rows, columns // 2)
        tensors[f"{module}.bitmask"] = (bits << torch.arange(8)).sum(-1).to(torch.uint8)
        tensors[f"{module}.shape"] = torch.tensor([[rows], [columns]])
    save_file(tensors, file, metadata={"format": "pt"})


def write_training(source: Path, target: Path) -> None:
    """A training checkpoint: weights off the pattern no longer zero, and two scales a row."""
    torch.manual_seed(1)
    copy_with_config(source, target, cast_config("training", ["lm_head"]))
    file = target / "model.safetensors"
    tensors = load_file(file)
    for name, weight in list(tensors.items()):
        if is_linear(name, weight):
            noise = torch.rand_like(weight) * weight.abs()[weight != 0].min() / 2
            tensors[name] = torch.where(weight == 0, noise, weight)
            scale = 1 + torch.rand(len(weight), 2) / 4
            tensors[name.replace(".weight", ".cast_scale")] = scale
    save_file(tensors, file, metadata={"format": "pt"})
