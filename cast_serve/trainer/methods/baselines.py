"""The methods that CAST is compared with. All train with AdamW without weight decay.

What each takes from its paper, and what is open, is in docs/method.md.
"""

from torch import nn
from transformers import PreTrainedModel

from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.data import BlockStream
from cast_serve.trainer.gradient import Gradient
from cast_serve.trainer.layers import LayerChoice
from cast_serve.trainer.methods.adamw import MaskedAdamW
from cast_serve.trainer.methods.base import Method
from cast_serve.trainer.methods.layers import add_masks
from cast_serve.trainer.methods.start import prune_at_start
from cast_serve.trainer.run_dir import Fixed

# lambda_W of SR-STE's ImageNet runs.
SR_STE_DECAY = 2e-4
# The defaults of AST's published code: its decay, and an increase over half of the steps.
AST_DECAY = 6e-5
AST_RAMP = 0.5


class Dense(Method):
    """The same loss, data and schedule with nothing sparse."""

    def add_layers(
        self,
        model: PreTrainedModel,
        layers: list[LayerChoice],
        stream: BlockStream,
        *,
        resumed: bool,
    ) -> None:
        assert all(layer.dense_because for layer in layers), "a dense run has no sparse layer"

    def optimizer(self, model: nn.Module, fixed: Fixed) -> MaskedAdamW:
        return _adamw(self.config, model, fixed)


class FixedMask(Method):
    """Pruned before training; the survivors are trained, the mask never changes."""

    def add_layers(
        self,
        model: PreTrainedModel,
        layers: list[LayerChoice],
        stream: BlockStream,
        *,
        resumed: bool,
    ) -> None:
        if not resumed:
            prune_at_start(
                model,
                layers,
                self.config.initial_mask,
                pattern=self.config.nm,
                stream=stream,
            )
        _add_masks(self.config, model, layers, straight_through=False)

    def optimizer(self, model: nn.Module, fixed: Fixed) -> MaskedAdamW:
        return _adamw(self.config, model, fixed)


class SrSte(Method):
    """Masked forward, straight-through gradient, lambda * w on pruned weights, mask each step."""

    def add_layers(
        self,
        model: PreTrainedModel,
        layers: list[LayerChoice],
        stream: BlockStream,
        *,
        resumed: bool,
    ) -> None:
        _add_masks(self.config, model, layers, straight_through=True)

    def decay(self, gradient: Gradient) -> float:
        return SR_STE_DECAY

    def optimizer(self, model: nn.Module, fixed: Fixed) -> MaskedAdamW:
        return _adamw(self.config, model, fixed, mask_interval=1)


class Ast(SrSte):
    """SR-STE whose lambda rises over the first half of the run; a mask holds for an interval."""

    def decay(self, gradient: Gradient) -> float:
        return AST_DECAY

    def optimizer(self, model: nn.Module, fixed: Fixed) -> MaskedAdamW:
        return _adamw(
            self.config,
            model,
            fixed,
            ramp_steps=round(AST_RAMP * fixed.steps),
            mask_interval=self.config.mask_interval,
        )


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


def _adamw(
    config: RunConfig,
    model: nn.Module,
    fixed: Fixed,
    *,
    ramp_steps: int = 0,
    mask_interval: int | None = None,
) -> MaskedAdamW:
    return MaskedAdamW(
        model,
        lr=fixed.lr,
        pattern=config.nm,
        decay=fixed.lambda_,
        ramp_steps=ramp_steps,
        mask_interval=mask_interval,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )
