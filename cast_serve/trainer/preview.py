"""What a run would give if it ended at this step, without ending it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cast_serve.trainer.config import Pattern
from cast_serve.trainer.evaluation.mean_loss import mean_loss, to_perplexity
from cast_serve.trainer.layers import scaled_layers
from cast_serve.trainer.processes import ALONE, Processes
from cast_serve.trainer.sharding import local


def preview(
    model: nn.Module,
    windows: torch.Tensor,
    pattern: Pattern,
    *,
    batch_size: int = 8,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Loss and perplexity on `windows` int [count, context]: as the model trains, and as pruned.

    `eval_loss_pruned` and `eval_perplexity_pruned` are those of the pruned and folded model; a
    model without sparsified layers has none.
    """
    loss = mean_loss(model, windows, batch_size=batch_size, processes=processes)
    found = {"eval_loss": loss, "eval_perplexity": to_perplexity(loss)}
    if any(True for _ in scaled_layers(model)):
        with pruned(model, pattern):
            loss = mean_loss(model, windows, batch_size=batch_size, processes=processes)
        found |= {"eval_loss_pruned": loss, "eval_perplexity_pruned": to_perplexity(loss)}
    return found


@contextmanager
def pruned(model: nn.Module, pattern: Pattern) -> Iterator[None]:
    """Within the block `model` is pruned and folded; at its end, bit for bit what it was."""
    # In host memory: a step leaves no room for a second copy of the sparse weights on a full GPU.
    kept = [
        (local(tensor.detach()), local(tensor.detach()).to("cpu", copy=True))
        for _, layer in scaled_layers(model)
        for tensor in (layer.weight, layer.cast_scale, *layer.buffers(recurse=False))
    ]
    try:
        for _, layer in scaled_layers(model):
            layer.prune_and_fold_(pattern)
        yield
    finally:
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)
