"""The methods that CAST is compared with. All train with AdamW without weight decay.

What each takes from its paper, and what is open, is in docs/method.md.
"""

from torch import nn
from transformers import PreTrainedModel

from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.gradient import Gradient
from cast_serve.trainer.layers import LayerChoice
from cast_serve.trainer.methods.adamw import MaskedAdamW
from cast_serve.trainer.methods.base import Method
from cast_serve.trainer.methods.layers import add_masks
from cast_serve.trainer.run_dir import Fixed

# lambda_W of SR-STE's ImageNet runs.
SR_STE_DECAY = 2e-4
# The defaults of AST's published code: its decay, and an increase over half of the steps.
AST_DECAY = 6e-5
AST_RAMP = 0.5


class _WithAdamW(Method):
    """A method whose optimizer is MaskedAdamW."""

    def mask_interval(self) -> int | None:
        """Steps that a mask holds for; None: for ever."""
        return None

    def ramp_steps(self, fixed: Fixed) -> int:
        """Steps over which lambda rises."""
        return 0

    def optimizer(self, model: nn.Module, fixed: Fixed) -> MaskedAdamW:
        return MaskedAdamW(
            model,
            lr=fixed.lr,
            decay=fixed.lambda_,
            ramp_steps=self.ramp_steps(fixed),
            mask_interval=self.mask_interval(),
            betas=(self.config.beta1, self.config.beta2),
            eps=self.config.eps,
        )


class Dense(_WithAdamW):
    """The same loss, data and schedule with nothing sparse."""

    def replace_layers(self, model: PreTrainedModel, layers: list[LayerChoice]) -> None:
        assert all(layer.dense_because for layer in layers), "a dense run has no sparse layer"


class FixedMask(_WithAdamW):
    """Pruned before training; the survivors are trained, the mask never changes."""

    def replace_layers(self, model: PreTrainedModel, layers: list[LayerChoice]) -> None:
        _add_masks(self.config, model, layers, straight_through=False)


class SrSte(_WithAdamW):
    """Masked forward, straight-through gradient, lambda * w on pruned weights, mask each step."""

    def mask_interval(self) -> int:
        return 1

    def replace_layers(self, model: PreTrainedModel, layers: list[LayerChoice]) -> None:
        _add_masks(self.config, model, layers, straight_through=True)

    def decay(self, gradient: Gradient) -> float:
        return SR_STE_DECAY


class Ast(SrSte):
    """SR-STE whose lambda rises over the first half of the run; a mask holds for an interval."""

    def mask_interval(self) -> int:
        return self.config.mask_interval

    def ramp_steps(self, fixed: Fixed) -> int:
        return round(AST_RAMP * fixed.steps)

    def decay(self, gradient: Gradient) -> float:
        return AST_DECAY


def _add_masks(
    config: RunConfig, model: PreTrainedModel, layers: list[LayerChoice], *, straight_through: bool
) -> None:
    add_masks(
        model,
        layers,
        pattern=config.nm,
        scaling_blocks=config.scaling_blocks,
        straight_through=straight_through,
        learn_scale=config.learns_scales,
    )
