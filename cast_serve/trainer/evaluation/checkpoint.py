"""Any checkpoint this project reads, as a transformers model in memory; its folder is only read.

no quantization_config     transformers loads it
cast, compressed-tensors   model_loaders reads it, 2:4 layers are unpacked, and a training
                           checkpoint is pruned and folded: the model that would be served
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cast_serve.kernels.packing import unpack
from cast_serve.model_loaders.checkpoint import CONFIG, Checkpoint
from cast_serve.model_loaders.formats import Format, recognise
from cast_serve.model_loaders.layers import WEIGHT, find_layers, is_transposed
from cast_serve.model_loaders.stream import PackedLinear, stream
from cast_serve.trainer.from_weights import build_model
from cast_serve.trainer.source import load_source, read_config


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint ready to be evaluated; `form` is how it was stored."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    form: Format


def load_checkpoint(folder: Path, *, dtype: torch.dtype) -> Loaded:
    """Load `folder` in eval mode, on the CPU, its weights rounded to `dtype`.

    Raises:
        RunError: no such folder, no model or tokenizer that transformers knows, incomplete.
        CheckpointError: a format that is not read, or damaged weights.
    """
    form = recognise(read_config(folder), folder / CONFIG).format
    if form is Format.PLAIN:
        source = load_source(folder)
        model, tokenizer = source.model, source.tokenizer
    else:
        model, tokenizer = build_model(folder, _dense_weights(Checkpoint.open(folder)))
    # Parameters alone: model.to(dtype) would round the rotary frequencies, which stay in fp32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return Loaded(model=model.eval(), tokenizer=tokenizer, form=form)


def _dense_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor by its stock name, 2:4 layers with their zeros."""
    model_type = checkpoint.config.get("model_type")
    weights = {}
    for item in stream(checkpoint, layers=find_layers(checkpoint)):
        if isinstance(item, PackedLinear):
            weight = unpack(item.values, item.bitmask)
            weights[item.name + WEIGHT] = (
                weight.t() if is_transposed(model_type, item.name) else weight
            )
        else:
            weights[item.name] = item.tensor
    return weights
