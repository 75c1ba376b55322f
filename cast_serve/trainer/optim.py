"""AdamS: Adam whose decay acts on masked weights only, and fades in over the run.

CAST (arXiv 2509.25996), Algorithm 1 and Eq. 7-8, read literally, for t = 1..T:

    m      = mask of the N largest |w| of each group, refreshed every T1 steps before the update
    mu_t   = b1*mu_{t-1} + (1-b1)*g_t                         the decay never enters this buffer
    mu~_t  = (1-a_t)*mu_t + a_t*lambda*sign(w_{t-1})          masked weights, a_t = t/T
    mu~_t  = mu_t                                             all others
    v_t    = b2*v_{t-1} + (1-b2)*mu~_t^2                      of mu~, not of the gradient
    w_t    = w_{t-1} - lr_t * (mu~_t/(1-b1^t)) / (sqrt(v_t/(1-b2^t)) + eps)

Since v takes mu~ without its bias correction, the first update is 1/(1-b1) = 10 times the rate and
the steady state about 1.0 times it (Adam: 0.23): warm the rate up, and do not reuse Adam's.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from cast_serve.trainer.config import Pattern
from cast_serve.trainer.masks import weight_mask
from cast_serve.trainer.schedule import decay_share


class AdamS(torch.optim.Optimizer):
    """AdamS over parameter groups with the key `input_dim`.

    `input_dim` is the dimension groups of the pattern run along (1 for nn.Linear, 0 for Conv1D),
    or None where a group's parameters stay dense and get the plain rule. State per parameter: `mu`
    and `nu` in its dtype and, where sparsified, `mask` (bool, True survives) in its layout. The
    step count t is kept in each group, so that state_dict() is the whole state.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        decay: float,
        total_steps: int,
        pattern: Pattern,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        mask_interval: int = 10,
    ) -> None:
        super().__init__(
            groups,
            {
                "lr": lr,
                "decay": decay,
                "total_steps": total_steps,
                "betas": betas,
                "eps": eps,
                "mask_interval": mask_interval,
                "kept": pattern.kept,
                "group": pattern.group,
                "input_dim": None,
                "step": 0,
                # Share of mask entries the last refresh changed; None before the second.
                "flips": None,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update. Parameters without a gradient are left alone, their masks too."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["input_dim"] is not None and group["step"] % group["mask_interval"] == 0:
                self._refresh(group)
            group["step"] += 1
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)
        return loss

    def masked_weights(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(weight, mask) of every sparsified parameter that has a mask yet."""
        for group in self.param_groups:
            for weight in group["params"]:
                if "mask" in self.state[weight]:
                    yield weight, self.state[weight]["mask"]

    @property
    def flips(self) -> float | None:
        """Share of mask entries changed by the last refresh; None before the second refresh."""
        counts = [
            (group["flips"], sum(weight.numel() for weight in group["params"]))
            for group in self.param_groups
            if group["flips"] is not None
        ]
        total = sum(count for _, count in counts)
        return sum(flips * count for flips, count in counts) / total if total else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; the base class casts every state tensor to its parameter's dtype, masks too."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "mask" in state:
                state["mask"] = state["mask"].bool()

    def _refresh(self, group: dict[str, Any]) -> None:
        pattern = Pattern(kept=group["kept"], group=group["group"])
        changed, total, first = 0, 0, False
        for weight in group["params"]:
            mask = weight_mask(weight, pattern, input_dim=group["input_dim"])
            before = self.state[weight].get("mask")
            first |= before is None
            if before is not None:
                changed += int((mask != before).sum())
            total += mask.numel()
            self.state[weight]["mask"] = mask
        group["flips"] = None if first or not total else changed / total

    def _update(self, weight: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state, t = self.state[weight], group["step"]
        beta1, beta2 = group["betas"]
        if "mu" not in state:
            state["mu"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
            state["nu"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        mu, nu = state["mu"], state["nu"]
        mu.mul_(beta1).add_(grad, alpha=1 - beta1)
        blended = mu
        if group["input_dim"] is not None:
            share = decay_share(t, group["total_steps"])
            decayed = mu.mul(1 - share).add_(weight.sign(), alpha=share * group["decay"])
            blended = torch.where(state["mask"], mu, decayed)
        nu.mul_(beta2).addcmul_(blended, blended, value=1 - beta2)
        scale = nu.div(1 - beta2**t).sqrt_().add_(group["eps"])
        weight.addcdiv_(blended, scale, value=-group["lr"] / (1 - beta1**t))
