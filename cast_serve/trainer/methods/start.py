"""Pruning before training: by magnitude, or by a one-shot method on a sample of the text."""

from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cast_serve.trainer.config import Pattern
from cast_serve.trainer.data import BlockStream
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.layers import LayerChoice
from cast_serve.trainer.masks import weight_mask
from cast_serve.trainer.oneshot.prune import prune_oneshot

# As Wanda and SparseGPT calibrate.
CALIBRATION_SEQUENCES = 128


@torch.no_grad()
def prune_at_start(
    model: PreTrainedModel,
    layers: list[LayerChoice],
    method: Literal["magnitude", "wanda", "sparsegpt"],
    *,
    pattern: Pattern,
    stream: BlockStream,
) -> None:
    """Prune every chosen layer of the dense `model` to `pattern`, in place.

    Args:
        method: magnitude, wanda or sparsegpt; sparsegpt changes surviving weights too.
        stream: its first 128 sequences calibrate.

    Raises:
        RunError: the one-shot method prunes other layers than `layers`, or not to the pattern.
    """
    if method != "magnitude":
        found = prune_oneshot(model, method, pattern, calibration_ids(stream).to(model.device))
        _require_same(method, found, layers)
    for choice in layers:
        if choice.dense_because is not None:
            continue
        layer = model.get_submodule(choice.name)
        assert isinstance(layer, nn.Linear | Conv1D)
        input_dim = 0 if isinstance(layer, Conv1D) else 1
        pruned = ~weight_mask(layer.weight, pattern, input_dim=input_dim)
        if method != "magnitude" and layer.weight[pruned].any():
            raise RunError(f"{method}: {choice.name} is not {pattern} after pruning")
        layer.weight.masked_fill_(pruned, 0)


def calibration_ids(stream: BlockStream) -> torch.Tensor:
    """The first 128 sequences of `stream`, a shorter one read again: int [128, context]."""
    items = [stream[i % len(stream)]["input_ids"] for i in range(CALIBRATION_SEQUENCES)]
    return torch.stack(items)


def _require_same(method: str, found: list[LayerChoice], wanted: list[LayerChoice]) -> None:
    """scaling_blocks, which one-shot methods do not know, may leave a layer dense here."""
    names = [
        {layer.name for layer in some if layer.dense_because is None} for some in (found, wanted)
    ]
    for name in sorted(names[0] ^ names[1]):
        raise RunError(
            f"{method}: it prunes other layers than the run, such as {name}; give a scaling_blocks "
            "that divides its K"
        )
