"""A default for lambda: the size of the gradient that the decay of a masked weight replaces.

lambda "should be of the order of the gradient" (CAST, App. D): in Eq. 7 it takes the place of the
momentum. Too small, and the decay only wins in the last steps and the final prune does damage.
"""

import math

import torch
from transformers import PreTrainedModel

from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.data import BlockStream, collate
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.head import loss_head
from cast_serve.trainer.layers import scaled_layers
from cast_serve.trainer.objective import Objective

_STEPS = 8


def measure_lambda(model: PreTrainedModel, stream: BlockStream, config: RunConfig) -> float:
    """RMS over the sparsified weights of one step's gradient, over the first 8 steps' batches.

    The KL has no gradient where the student still equals its teacher, so only (1-eta) * CE is
    run; gradients are clipped as in training.

    Raises:
        RunError: the gradient is zero or not finite.
    """
    torch.manual_seed(config.seed)
    layers = [layer for _, layer in scaled_layers(model)]
    square = 0.0
    model.train()
    for step in range(_STEPS):
        _backward(model, stream, config, step)
        norm = torch.nn.utils.get_total_norm(
            p.grad for p in model.parameters() if p.grad is not None
        )
        factor = min(1.0, config.clip / (norm.item() + 1e-6)) if config.clip else 1.0
        grads = [layer.weight.grad for layer in layers if layer.weight.grad is not None]
        square += factor**2 * math.fsum(g.square().sum(dtype=torch.float64).item() for g in grads)
        model.zero_grad(set_to_none=True)
    rms = math.sqrt(square / (_STEPS * sum(layer.weight.numel() for layer in layers)))
    if not (0 < rms < math.inf):
        raise RunError(f"lambda: the first batches' gradient RMS is {rms}; give --lambda yourself")
    return rms


def _backward(model: PreTrainedModel, stream: BlockStream, config: RunConfig, step: int) -> None:
    """Accumulate one step's gradient."""
    device = model.device.type
    for micro in range(config.gradient_accumulation):
        first = (step * config.gradient_accumulation + micro) * config.batch_size
        # A run shorter than the measurement has fewer batches: measure on those again.
        items = [stream[(first + i) % len(stream)] for i in range(config.batch_size)]
        ids = collate(items)["input_ids"].to(model.device)
        with torch.autocast(device, torch.bfloat16, enabled=config.compute == "bf16"):
            loss = Objective(eta=0.0)(model, loss_head(model), ids, None)
        (loss.total * (1 - config.eta) / config.gradient_accumulation).backward()
