"""A default for lambda: the size of the gradient that the decay of a masked weight replaces.

lambda "should be of the order of the gradient" (CAST, App. D): in Eq. 7 it takes the place of the
momentum. Too small, and the decay only wins in the last steps and the final prune does damage.
"""

import math

import torch
from torch.distributed.tensor import DTensor

from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.gradient import Gradient
from cast_serve.trainer.layers import scaled_layers

_STEPS = 8


def require_lambda(config: RunConfig) -> None:
    """Raise RunError where lambda is to be measured and there is no gradient to measure it by."""
    if config.eta == 1 and config.lambda_ is None and config.method == "cast":
        raise RunError(
            "lambda: must be given with eta=1, because it is measured by the gradient of the "
            "cross-entropy: the KL of a student that equals its teacher has none"
        )


def measure_lambda(gradient: Gradient) -> float:
    """RMS over the sparsified weights of one step's gradient, over the first 8 steps' sequences.

    The KL has no gradient where the student still equals its teacher, so only (1-eta) * CE is
    run, also where the run starts pruned; gradients are clipped as in training.

    Raises:
        RunError: the gradient is zero or not finite.
    """
    layers = [layer for _, layer in scaled_layers(gradient.model)]
    share = 1 - gradient.config.eta
    square = torch.zeros((), dtype=torch.float64, device=gradient.processes.device)
    for step in range(_STEPS):
        gradient.accumulate(step, eta=0.0)
        for parameter in gradient.model.parameters():
            if parameter.grad is not None:
                parameter.grad *= share
        gradient.clip()
        for layer in layers:
            if layer.weight.grad is not None:
                grad = layer.weight.grad
                found = grad.square().sum(dtype=torch.float64)
                found = found.full_tensor() if isinstance(found, DTensor) else found
                square += found.to(square.device)
        gradient.model.zero_grad(set_to_none=True)
    count = _STEPS * sum(layer.weight.numel() for layer in layers)
    rms = math.sqrt(square.item() / count)
    if not (0 < rms < math.inf):
        raise RunError(f"lambda: the first batches' gradient RMS is {rms}; give --lambda yourself")
    return rms
