"""Any checkpoint this project reads, as a transformers model in memory; its folder is only read.

no quantization_config     transformers loads it
cast, compressed-tensors   model_loaders reads it, 2:4 layers are unpacked, and a training
                           checkpoint is pruned and folded: the model that would be served
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cast_serve.model_loaders.checkpoint import CONFIG, Checkpoint
from cast_serve.model_loaders.formats import Format, recognise
from cast_serve.trainer.from_weights import build_model, unpacked
from cast_serve.trainer.head import put_loss_head, returns_its_head
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
        weights = {name: tensor for name, tensor, _ in unpacked(Checkpoint.open(folder))}
        model, tokenizer = build_model(folder, weights)
    # Parameters alone: model.to(dtype) would round the rotary frequencies, which stay in fp32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.eval()
    if returns_its_head(model):
        # A text's logits are many times its hidden states: the loss is computed chunk by chunk.
        put_loss_head(model)
    return Loaded(model=model, tokenizer=tokenizer, form=form)
