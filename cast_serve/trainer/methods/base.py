"""What a training method decides: layers, optimizer, strength of the decay."""

from abc import ABC, abstractmethod

from torch import nn
from transformers import PreTrainedModel

from cast_serve.trainer.adams.optimizer import AdamS
from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.data import BlockStream
from cast_serve.trainer.gradient import Gradient
from cast_serve.trainer.layers import LayerChoice
from cast_serve.trainer.methods.adamw import MaskedAdamW
from cast_serve.trainer.methods.start import prune_at_start
from cast_serve.trainer.run_dir import Fixed


class Method(ABC):
    """One way to train a dense model to N:M sparsity, under one configuration."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def add_layers(
        self,
        model: PreTrainedModel,
        layers: list[LayerChoice],
        stream: BlockStream,
        *,
        resumed: bool,
    ) -> None:
        """Make `model`, dense and untouched, the model that is trained; in place.

        Args:
            layers: every linear layer, sparsified or with the reason why not.
            stream: the sequences of the run, to calibrate on.
            resumed: a checkpoint's weights and masks will replace those made here.
        """
        if not resumed:
            self.prune(model, layers, stream)
        self.replace_layers(model, layers)

    def prune(self, model: PreTrainedModel, layers: list[LayerChoice], stream: BlockStream) -> None:
        """Prune before training, in place, where the run starts sparse."""
        config = self.config
        if config.pruned_first is not None:
            prune_at_start(model, layers, config.pruned_first, pattern=config.nm, stream=stream)

    @abstractmethod
    def replace_layers(self, model: PreTrainedModel, layers: list[LayerChoice]) -> None:
        """Replace the chosen layers of `model` by those that are trained; in place."""

    def decay(self, gradient: Gradient) -> float:
        """lambda where the configuration gives none; 0 without a decay."""
        return 0.0

    @abstractmethod
    def optimizer(self, model: nn.Module, fixed: Fixed) -> AdamS | MaskedAdamW:
        """The optimizer of a model that add_layers has made ready."""
