"""What keeps the pattern: gradients of the kept slots alone, or a low-rank product in them alone.

    full           dL/dW <- M * dL/dW, so AdamW's moments, its decay and its update are 0 wherever a
                   weight is pruned and 0
    masked lora    y = x (W + M * s B A)^T, W frozen; merging adds the very same M * s B A
    lora           y = x W^T + s (x A^T) B^T; B A is dense, so it can only stay separate

M is the stored bitmask, s = alpha / rank.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from cast_serve.trainer.errors import RunError
from cast_serve.trainer.sparse_source import SparseSource

_MASK = "cast_mask"


class MaskedLora(lora.Linear):
    """LoRA whose product is masked like the layer under it, in the forward pass and in the merge.

    The base layer (nn.Linear [N, K], Conv1D [K, N]) carries its mask as the buffer `cast_mask`.
    """

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """M * s B A in the layout of the base weight; what peft's merge adds."""
        return super().get_delta_weight(adapter) * getattr(self.get_base_layer(), _MASK)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.merged or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        weight = base.weight
        for adapter in self.active_adapters:
            weight = weight + self.get_delta_weight(adapter)
        return functional.linear(x, weight.t() if self.fan_in_fan_out else weight, base.bias)


def mask_gradients(layers: Iterable[tuple[nn.Module, torch.Tensor]]) -> None:
    """Let only kept slots have a gradient.

    Args:
        layers: (module, mask) on the device of training; pruned entries of each weight are 0.
    """
    for module, mask in layers:
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        weight.register_hook(partial(torch.mul, mask.to(weight.device)))


def add_lora(
    source: SparseSource, *, rank: int, alpha: float, targets: tuple[str, ...], masked: bool
) -> PeftModel:
    """Wrap `source.model` with an adapter on its sparse linears.

    Args:
        targets: last parts of the names of sparse linears; empty: all.
        masked: mask the product, so that it can be merged.

    Raises:
        RunError: a target is no sparse linear.
    """
    leaves = {name: name.rpartition(".")[2] for name in source.masks}
    known = sorted(set(leaves.values()))
    if unknown := [target for target in targets if target not in known]:
        raise RunError(
            f"lora_target: {', '.join(unknown)} is no sparse linear of the model; "
            f"it has {', '.join(known)}"
        )
    chosen = [name for name, leaf in leaves.items() if not targets or leaf in targets]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any number works
        # Full names: a leaf may also be the name of a linear that stays dense.
        target_modules=chosen if masked else sorted({leaves[name] for name in chosen}),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        fan_in_fan_out=isinstance(source.model.get_submodule(chosen[0]), Conv1D),
    )
    if masked:
        for name in chosen:
            source.model.get_submodule(name).register_buffer(
                _MASK, source.masks[name], persistent=False
            )
        config._register_custom_module({nn.Linear: MaskedLora, Conv1D: MaskedLora})
    wrapped = get_peft_model(source.model, config)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def merge(model: PeftModel) -> nn.Module:
    """Add the masked products to the weights, by peft's own merge, and take the adapters off."""
    # peft asks its generic tuner class, whose attribute lookup mypy cannot follow.
    merged: nn.Module = model.merge_and_unload()  # type: ignore[operator]
    return merged
