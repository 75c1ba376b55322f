"""AdamW for layers that apply a mask in their forward pass, with SR-STE's sparse-refined term.

For t = 1..T, with w the dense weight and m the mask that its layer applied in this step:

    g_t  <- g_t + lambda_t * (1-m) * w_{t-1}        SR-STE (arXiv 2102.04010), Eq. 8
    w_t  =  AdamW(w_{t-1}, g_t), weight decay 0
    m    <- N largest |w_t| of each group           every `mask_interval` steps; of |w_t| ||x||
                                                    with `mask_metric: activation`

lambda_t rises linearly to lambda over the first `ramp_steps` steps (AST's annealing, arXiv
2407.20584) and is lambda from then on; 0 ramp steps is SR-STE. The term is added to the gradient
that has been clipped, so it passes through both moments of Adam.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from cast_serve.trainer import flips
from cast_serve.trainer.adams.rule import Implementation
from cast_serve.trainer.layers import optimizer_groups
from cast_serve.trainer.methods.layers import masked_layers
from cast_serve.trainer.refresh import Masked, make_implementation, refresh_masks


class MaskedAdamW(torch.optim.AdamW):
    """torch's AdamW over a model whose sparsified layers are MaskedLayers, if it has any.

    `mask` is part of a sparsified weight's state and is the very tensor its layer applies, so
    that state_dict() is the whole state and loading it changes the forward pass too.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        decay: float = 0.0,
        ramp_steps: int = 0,
        mask_interval: int | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        """Args: decay: lambda. mask_interval: steps a mask is kept for, None for ever."""
        super().__init__(
            optimizer_groups(model),
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=0.0,
            # One launch for all weights; torch takes it by itself nowhere.
            fused=next(model.parameters()).is_cuda,
        )
        for group in self.param_groups:
            group |= {
                "decay": decay,
                "ramp_steps": ramp_steps,
                "mask_interval": mask_interval,
                "steps_done": 0,
                # Share of mask entries the last refresh changed; None before the first.
                "flips": None,
            }
        self._layers = {layer.weight: layer for _, layer in masked_layers(model)}
        # By the dimension that groups run along.
        self._implementations: dict[int, Implementation] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update. Weights without a gradient are left alone."""
        assert closure is None, "the gradient is computed before"
        for group in self._masked_groups():
            self._refine(group)
        super().step()
        # Masks join the state after the update: AdamW takes a state that is not empty for its own.
        for group in self._masked_groups():
            group["steps_done"] += 1
            for weight in group["params"]:
                if weight in self.state:
                    self.state[weight]["mask"] = self._layers[weight].mask
            interval = group["mask_interval"]
            if interval is not None and group["steps_done"] % interval == 0:
                self._refresh(group)
        return None

    def masked_weights(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(weight, mask) of every sparsified parameter."""
        for weight, layer in self._layers.items():
            yield weight, layer.mask

    @property
    def flips(self) -> float | None:
        """Share of mask entries changed by the last refresh; None before the first.

        Waits for the device.
        """
        return flips.of_all(self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """The base class's; plain numbers in the groups."""
        return flips.as_numbers(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the moments, the masks, and with them what the layers apply."""
        super().load_state_dict(state_dict)
        for weight, layer in self._layers.items():
            if weight in self.state:
                # The base class has cast it to the weight's dtype.
                layer.mask.copy_(self.state[weight]["mask"].bool())
                self.state[weight]["mask"] = layer.mask

    def _masked_groups(self) -> Iterator[dict[str, Any]]:
        return (group for group in self.param_groups if group["input_dim"] is not None)

    def _refine(self, group: dict[str, Any]) -> None:
        if group["decay"] == 0:
            return
        share = min(1.0, (group["steps_done"] + 1) / max(1, group["ramp_steps"]))
        for weight in group["params"]:
            if weight.grad is not None:
                pruned = weight.masked_fill(self._layers[weight].mask, 0)
                weight.grad.add_(pruned, alpha=share * group["decay"])

    def _refresh(self, group: dict[str, Any]) -> None:
        layers = [self._layers[weight] for weight in group["params"]]
        input_dim = group["input_dim"]
        if input_dim not in self._implementations:
            self._implementations[input_dim] = make_implementation("auto", group["params"])
        # A tensor, that nothing is waited for: SR-STE comes here every step.
        changed = refresh_masks(
            self._implementations[input_dim],
            [
                Masked(weight=layer.weight, mask=layer.mask, importance=layer.importance)
                for layer in layers
            ],
            layers[0].pattern,
            input_dim=input_dim,
        )
        group["flips"] = changed.double() / sum(weight.numel() for weight in group["params"])
