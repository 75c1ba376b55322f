"""Pruning before training: by magnitude, or by a one-shot method on a sample of the text."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cast_serve.trainer.config import Pattern
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.layers import LayerChoice
from cast_serve.trainer.masks import weight_mask

# As Wanda and SparseGPT calibrate.
_CALIBRATION_BLOCKS = 128


@torch.no_grad()
def prune_at_start(
    model: PreTrainedModel,
    layers: list[LayerChoice],
    method: str,
    *,
    pattern: Pattern,
    blocks: torch.Tensor,
    seed: int,
) -> None:
    """Prune every chosen layer of the dense `model` to `pattern`, in place.

    Args:
        method: magnitude, wanda or sparsegpt; sparsegpt changes surviving weights too.
        blocks: training text int32 [blocks, context]; up to 128 drawn by `seed` calibrate.

    Raises:
        RunError: the one-shot method left a layer that is not of the pattern.
    """
    if method != "magnitude":
        from cast_serve.trainer.oneshot import prune_oneshot

        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
        sample = blocks[order[:_CALIBRATION_BLOCKS]].long().to(model.device)
        prune_oneshot(model, method, pattern, sample)
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
