"""Linear layers that compute with a masked weight: y = x @ (m * W).T.

The gradient of W is that of the masked weight: straight through, for all entries (SR-STE), or for
the survivors alone (a fixed mask). `weight`, `bias` and `cast_scale` are those of a layer of
layers.py, so the same prune and export end the run; the scale stays 1 unless it is learned.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cast_serve.trainer.config import Pattern
from cast_serve.trainer.layers import (
    LayerChoice,
    ScaledConv1D,
    ScaledLayer,
    ScaledLinear,
    scale_weight,
)


class MaskedLayer(ScaledLayer):
    """What the masked nn.Linear and Conv1D share.

    `mask` (bool, True survives) has the layout of the weight. It is not in the state dict: the
    optimizer, which refreshes it, keeps it.
    """

    mask: torch.Tensor

    def __init__(
        self,
        layer: nn.Linear | Conv1D,
        *,
        blocks: int,
        pattern: Pattern,
        straight_through: bool,
        learn_scale: bool,
    ) -> None:
        super().__init__(layer, blocks=blocks)
        self.cast_scale.requires_grad_(learn_scale)
        self.straight_through = straight_through
        self.pattern = pattern
        self.register_buffer("mask", self.current_mask(pattern), persistent=False)

    def scaled_weight(self) -> torch.Tensor:
        """A * m * W in the layout and dtype of the weight."""
        if self.straight_through:
            masked = _StraightThrough.apply(self.weight, self.mask)
        else:
            masked = self.weight * self.mask
        if not self.cast_scale.requires_grad:
            return masked
        return scale_weight(masked, self.cast_scale, input_dim=self.input_dim)

    def set_importance(self, norms: torch.Tensor) -> None:
        super().set_importance(norms)
        self.refresh_mask_()

    @torch.no_grad()
    def refresh_mask_(self) -> None:
        """Make `mask` that of the weight as it is now, in place."""
        self.mask.copy_(self.current_mask(self.pattern))

    @torch.no_grad()
    def prune_and_fold_(self, pattern: Pattern) -> None:
        assert pattern == self.pattern, f"{pattern} of a layer that is {self.pattern}"
        # A mask that is kept for an interval may not be that of the weight as it is now.
        self.refresh_mask_()
        super().prune_and_fold_(pattern)


class MaskedLinear(MaskedLayer, ScaledLinear):
    """nn.Linear with a mask; weight [N, K]."""


class MaskedConv1D(MaskedLayer, ScaledConv1D):
    """GPT-2's Conv1D with a mask; weight [K, N]."""


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return weight * mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def add_masks(
    model: PreTrainedModel,
    choices: list[LayerChoice],
    *,
    pattern: Pattern,
    scaling_blocks: int,
    straight_through: bool,
    learn_scale: bool,
) -> None:
    """Replace every chosen layer by its masked form, which shares its storage; in place."""
    for choice in choices:
        if choice.dense_because is None:
            layer = model.get_submodule(choice.name)
            assert isinstance(layer, nn.Linear | Conv1D)
            kind = MaskedConv1D if isinstance(layer, Conv1D) else MaskedLinear
            masked = kind(
                layer,
                blocks=scaling_blocks,
                pattern=pattern,
                straight_through=straight_through,
                learn_scale=learn_scale,
            )
            model.set_submodule(choice.name, masked)


def masked_layers(model: nn.Module) -> Iterator[tuple[str, MaskedLayer]]:
    """(name, layer) of every masked layer."""
    for name, module in model.named_modules():
        if isinstance(module, MaskedLayer):
            yield name, module
