"""Model folders without weights, for servers that run with `--load-format dummy`.

What a step takes depends on shapes, not on what the weights say, so nothing is downloaded.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cast_serve.bench.serving.tokenizer import BOS, EOS, write_tokenizer
from cast_serve.bench.shapes import Model, find_model, find_named
from cast_serve.model_loaders.formats import QUANT_METHOD, SPARSITY


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A decoder as it is served: its linears, and what config.json says beside them.

    Attributes:
        max_model_len: what servers are started with: the longest workload fits, and the KV cache
            of a GPU holds the concurrent ones.
    """

    shape: Model
    layers: int
    vocabulary: int
    tied: bool
    rope_scaling: dict[str, Any] | None
    max_position: int = 131072
    max_model_len: int = 16384

    @property
    def name(self) -> str:
        return self.shape.name


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


MODELS = (
    ServedModel(
        shape=find_model("Llama-3.1-8B"),
        layers=32,
        vocabulary=128256,
        tied=False,
        rope_scaling=_llama3_rope(8.0),
    ),
    ServedModel(
        shape=Model(
            name="Llama-3.2-1B",
            hidden=2048,
            heads=32,
            kv_heads=8,
            head_dim=64,
            intermediate=8192,
        ),
        layers=16,
        vocabulary=128256,
        tied=True,
        rope_scaling=_llama3_rope(32.0),
    ),
    # For a CPU. 10240 words: `vllm bench latency` draws token ids below 10000.
    ServedModel(
        shape=Model(name="tiny", hidden=256, heads=4, kv_heads=2, head_dim=64, intermediate=512),
        layers=2,
        vocabulary=10240,
        tied=False,
        rope_scaling=None,
    ),
)


def find_served_model(name: str) -> ServedModel:
    """The model of that name, in any case.

    Raises:
        ValueError: there is none; lists those there are.
    """
    return find_named(name, MODELS)


def write_model(model: ServedModel, folder: Path, *, sparse: bool) -> None:
    """Write config.json, generation_config.json and a tokenizer into `folder`, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("config.json", config(model, sparse=sparse)),
        ("generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS}),
    ):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    write_tokenizer(folder, words=model.vocabulary)


def config(model: ServedModel, *, sparse: bool) -> dict[str, Any]:
    """config.json of `model`; the sparse one declares every linear of its blocks 2:4, packed."""
    shape = model.shape
    content = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": model.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": model.vocabulary,
        "max_position_embeddings": model.max_position,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": model.rope_scaling,
        "tie_word_embeddings": model.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    if sparse:
        content["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            "format": "packed",
            "sparsity": SPARSITY,
            "ignore": ["lm_head"],
            "version": 1,
        }
    return content
