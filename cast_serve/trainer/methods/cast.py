"""CAST as a Method: scaled layers, AdamS, lambda of the gradient's size."""

from torch import nn
from transformers import PreTrainedModel

from cast_serve.trainer.adams.optimizer import AdamS
from cast_serve.trainer.calibrate import measure_lambda
from cast_serve.trainer.gradient import Gradient
from cast_serve.trainer.layers import LayerChoice, add_scales, optimizer_groups, scaled_layers
from cast_serve.trainer.methods.base import Method
from cast_serve.trainer.run_dir import Fixed


class Cast(Method):
    """docs/method.md."""

    def replace_layers(self, model: PreTrainedModel, layers: list[LayerChoice]) -> None:
        add_scales(model, layers, scaling_blocks=self.config.scaling_blocks)

    def decay(self, gradient: Gradient) -> float:
        return measure_lambda(gradient)

    def optimizer(self, model: nn.Module, fixed: Fixed) -> AdamS:
        return AdamS(
            optimizer_groups(model),
            lr=fixed.lr,
            decay=fixed.lambda_,
            total_steps=fixed.steps,
            pattern=self.config.nm,
            betas=(self.config.beta1, self.config.beta2),
            eps=self.config.eps,
            mask_interval=self.config.mask_interval,
            decay_ramp=self.config.decay_ramp,
            masked_rate=self.config.masked_rate,
            second_moment=self.config.second_moment,
            importance={
                layer.weight: layer.importance
                for _, layer in scaled_layers(model)
                if layer.importance is not None
            },
        )
