"""Random weights for a model folder: dense, or the same 2:4 weights packed.

What servers load when loading is measured. Made on the GPU where there is one: 16 GB of them in
about half a minute, most of it writing.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from cast_serve.bench.serving.models import ServedModel
from cast_serve.kernels.packing import unpack
from cast_serve.kernels.pattern import random_mask
from cast_serve.model_loaders.write import ShardWriter

# As models are initialised: activations stay finite through all layers.
SPREAD = 0.02


def write_weights(
    model: ServedModel, folder: Path, *, sparse: bool, device: torch.device | str
) -> None:
    """Write the safetensors of `model` in bfloat16 into `folder`; `sparse`: packed.

    The dense form is the packed one unpacked, on the same device.
    """
    generator = torch.Generator(device).manual_seed(0)
    writer = ShardWriter(folder)
    for name, (rows, columns) in _matrices(model):
        if ".layers." not in name:
            writer.add(f"{name}.weight", _random(rows, columns, generator).cpu())
            continue
        values = _random(rows, columns // 2, generator)
        mask = random_mask(rows, columns, generator)
        if sparse:
            writer.add(f"{name}.compressed", values.cpu())
            writer.add(f"{name}.bitmask", mask.cpu())
            writer.add(f"{name}.shape", torch.tensor([[rows], [columns]]))
        else:
            writer.add(f"{name}.weight", unpack(values, mask).cpu())
    for name in _norms(model):
        writer.add(f"{name}.weight", torch.ones(model.shape.hidden, dtype=torch.bfloat16))
    writer.finish()


def _matrices(model: ServedModel) -> Iterator[tuple[str, tuple[int, int]]]:
    """Module names and [rows, columns] of all weights that are matrices."""
    shape = model.shape
    heads, kv_heads = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens", (model.vocabulary, shape.hidden)
    if not model.tied:
        yield "lm_head", (model.vocabulary, shape.hidden)
    for layer in range(model.layers):
        block = f"model.layers.{layer}"
        yield f"{block}.self_attn.q_proj", (heads, shape.hidden)
        yield f"{block}.self_attn.k_proj", (kv_heads, shape.hidden)
        yield f"{block}.self_attn.v_proj", (kv_heads, shape.hidden)
        yield f"{block}.self_attn.o_proj", (shape.hidden, heads)
        yield f"{block}.mlp.gate_proj", (shape.intermediate, shape.hidden)
        yield f"{block}.mlp.up_proj", (shape.intermediate, shape.hidden)
        yield f"{block}.mlp.down_proj", (shape.hidden, shape.intermediate)


def _norms(model: ServedModel) -> Iterator[str]:
    yield "model.norm"
    for layer in range(model.layers):
        yield f"model.layers.{layer}.input_layernorm"
        yield f"model.layers.{layer}.post_attention_layernorm"


def _random(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    shape = (rows, columns)
    device = generator.device
    weight = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    return weight.mul_(SPREAD)
