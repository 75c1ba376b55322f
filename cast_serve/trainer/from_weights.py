"""A transformers model from the folder of a sparse checkpoint and its weights, unpacked."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from cast_serve.kernels.packing import unpack
from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.model_loaders.layers import WEIGHT, is_transposed
from cast_serve.model_loaders.stream import PackedLinear, stream
from cast_serve.trainer.source import load_tokenizer, loading, require_whole


def unpacked(
    checkpoint: Checkpoint,
) -> Iterator[tuple[str, torch.Tensor, PackedLinear | None]]:
    """(stock name, tensor, what it is unpacked from) of every tensor; None for one that is dense.

    2:4 weights have their zeros and the layout of the model, Conv1D's [K, N].
    """
    for item in stream(checkpoint):
        if isinstance(item, PackedLinear):
            weight = unpack(item.values, item.bitmask)
            if is_transposed(checkpoint.config.get("model_type"), item.name):
                weight = weight.t()
            yield item.name + WEIGHT, weight, item
        else:
            yield item.name, item.tensor, None


def build_model(
    folder: Path, weights: dict[str, torch.Tensor]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of `folder`'s config.json with `weights`, fp32, and its tokenizer.

    Raises:
        RunError: transformers knows no such model or tokenizer, or a weight is missing.
    """
    tokenizer = load_tokenizer(folder)
    with loading(folder):
        config = _unquantized(AutoConfig.from_pretrained(folder, local_files_only=True))
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        # Not the constructor and load_state_dict: names may have changed between releases.
        model, found = kind.from_pretrained(
            None, config=config, state_dict=weights, dtype=torch.float32, output_loading_info=True
        )
    require_whole(folder, model, found)
    return model, tokenizer


def _unquantized(config: PretrainedConfig) -> PretrainedConfig:
    """`config` without the declaration that would send transformers to a quantizer."""
    for holder in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            if hasattr(holder, key):
                delattr(holder, key)
    return config
