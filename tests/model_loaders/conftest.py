"""A tiny model of two layers on disk in every format, written without the code under test."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

HIDDEN, FFN, VOCAB, LAYERS = 32, 64, 40, 2
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
SCALE_BLOCKS = 2

OURS = {"quant_method": "cast", "sparsity": "2:4", "ignore": ["lm_head"], "version": 1}
SPARSITY_CONFIG = {
    "format": "sparse-24-bitmask",
    "global_sparsity": 0.46,
    "ignore": ["lm_head"],
    "registry_requires_subclass": False,
    "sparsity_structure": "2:4",
    "targets": ["Linear"],
}
NEURAL_MAGIC = {
    "format": "dense",
    "global_compression_ratio": 1.24,
    "ignore": [],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "sparsity_config": SPARSITY_CONFIG,
}


def two_of_four(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """A 2:4 weight [N, K] with a -0.0, a group of zeros and a group of one non-zero."""
    rows, columns = shape
    weight = torch.randn(rows, columns // 4, 4, generator=generator)
    rank = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
    weight = weight.masked_fill(rank >= 2, 0.0)
    weight[0, 0] = 0.0
    weight[0, 1] = torch.tensor([0.0, -0.0, 0.0, 1.5])
    return weight.reshape(shape).bfloat16()


def compress(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compressed, bitmask and shape by the rules of compressed-tensors 0.14, in numpy."""
    dense = weight.float().numpy().reshape(-1, 4)
    kept = np.zeros(dense.shape, dtype=bool)
    order = np.argsort(-np.abs(dense), axis=1, kind="stable")[:, :2]
    np.put_along_axis(kept, order, True, axis=1)
    kept = kept.reshape(weight.shape)
    return {
        "compressed": weight[torch.from_numpy(kept)].reshape(weight.shape[0], -1),
        "bitmask": torch.from_numpy(np.packbits(kept, axis=1, bitorder="little")),
        "shape": torch.tensor([[weight.shape[0]], [weight.shape[1]]]),
    }


@dataclass
class Folder:
    """A checkpoint folder being put together; `save` writes it, as often as needed."""

    path: Path
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    # What the sparse linears are, by module name, dense and 2:4.
    expected: dict[str, torch.Tensor] = field(default_factory=dict)

    def save(self, *, shards: int = 1) -> "Folder":
        self.path.mkdir(exist_ok=True)
        self.write_json("config.json", self.config)
        if shards == 1:
            save_file(self.tensors, self.path / "model.safetensors", metadata={"format": "pt"})
            return self
        names = list(self.tensors)
        weight_map = {}
        for number in range(shards):
            shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            mine = {name: self.tensors[name].clone() for name in names[number::shards]}
            save_file(mine, self.path / shard, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(mine, shard))
        self.write_json("model.safetensors.index.json", {"weight_map": weight_map})
        return self

    def write_json(self, name: str, content: object) -> None:
        (self.path / name).write_text(json.dumps(content))


def build(path: Path, stored: str) -> Folder:
    """The tiny model in format `stored`, not yet saved."""
    generator = torch.Generator().manual_seed(7)
    folder = Folder(path=path, config={"model_type": "llama", "torch_dtype": "bfloat16"})
    tensors = folder.tensors
    tensors["model.embed_tokens.weight"] = torch.randn(VOCAB, HIDDEN, generator=generator)
    tensors["lm_head.weight"] = torch.randn(VOCAB, HIDDEN, generator=generator)
    tensors["model.norm.weight"] = torch.ones(HIDDEN)
    for layer in range(LAYERS):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(HIDDEN)
        for linear, shape in LINEARS.items():
            name = f"model.layers.{layer}.{linear}"
            weight = two_of_four(shape, generator)
            if stored == "training":
                # Master weights: nothing is zero, and a few groups have ties.
                dense = torch.where(weight == 0, 1e-4, weight.float() + weight.sign())
                dense[0, :8] = torch.tensor([4.0, 3.0, 2.0, 1.0, 1.0, 2.0, 3.0, 4.0])
                scale = torch.rand(shape[0], SCALE_BLOCKS, generator=generator) + 0.5
                tensors[name + ".weight"], tensors[name + ".cast_scale"] = dense, scale
                folder.expected[name] = prune_and_fold(dense, scale)
            elif stored in ("packed", "ct-bitmask"):
                for part, tensor in compress(weight).items():
                    tensors[f"{name}.{part}"] = tensor
                folder.expected[name] = weight
            else:
                tensors[name + ".weight"] = weight
                folder.expected[name] = weight
        tensors[f"model.layers.{layer}.self_attn.q_proj.bias"] = torch.zeros(HIDDEN)
    if stored in ("packed", "dense", "training"):
        folder.config["quantization_config"] = {**OURS, "format": stored}
    elif stored == "ct-bitmask":
        folder.config["quantization_config"] = NEURAL_MAGIC
    elif stored == "ct-dense":
        sparsity = {**SPARSITY_CONFIG, "format": "dense"}
        folder.config["quantization_config"] = {**NEURAL_MAGIC, "sparsity_config": sparsity}
    return folder


def prune_and_fold(dense: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Two largest of four, of equals the leftmost, times the scale of the block: in numpy."""
    weight = dense.numpy().astype(np.float32).reshape(-1, 4)
    dropped = np.argsort(-np.abs(weight), axis=1, kind="stable")[:, 2:]
    kept = weight.copy()
    np.put_along_axis(kept, dropped, 0.0, axis=1)
    kept = kept.reshape(dense.shape)
    blocks = np.repeat(scale.numpy(), dense.shape[1] // scale.shape[1], axis=1)
    return torch.from_numpy(kept * blocks)


Make = Callable[[str], Folder]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(format) -> the tiny model in that format, in a folder of its own, not yet saved."""
    return lambda stored: build(tmp_path / "model", stored)
