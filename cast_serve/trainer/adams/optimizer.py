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

With `second_moment` "gradient", which is not the paper's, v has g where the rule has mu: updates
of weights that survive or stay dense are Adam's, and those of masked weights under the full decay
the same as before.

The arithmetic is in rule.py (as written) and fused.py (GPUs); here is what it works on: parameter
groups, state, and the shards of a weight that several processes hold.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from cast_serve.trainer import flips
from cast_serve.trainer.adams.rule import Implementation, Slot, StepNumbers
from cast_serve.trainer.config import Pattern
from cast_serve.trainer.refresh import Masked, make_implementation, refresh_masks
from cast_serve.trainer.schedule import decay_share, masked_speed
from cast_serve.trainer.sharding import check_groups_whole, local, ranks_of, sum_over_ranks


@dataclass(kw_only=True)
class _Bound:
    """The slots of a group's weights that have gradients, kept from step to step.

    Attributes:
        identity: per weight its address and its state tensors' ids; another one, another slot.
        held: those state tensors, so that no other gets their ids.
    """

    identity: list[tuple[int, int, int, int]] = field(default_factory=list)
    held: list[torch.Tensor | None] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)


class AdamS(torch.optim.Optimizer):
    """AdamS over parameter groups with the key `input_dim`.

    `input_dim` is the dimension groups of the pattern run along (1 for nn.Linear, 0 for Conv1D),
    or None where a group's parameters stay dense and get the plain rule. State per parameter: `mu`
    and `nu` in its dtype and, where sparsified, `mask` (bool, True survives) in its layout; of a
    DTensor they are DTensors with its placements, so torch.distributed.checkpoint saves and
    reshards them. The step count t is kept in each group, so that state_dict() is the whole state.

    `decay_ramp` is the share of the run over which a_t goes from 0 to 1 (1: the paper's t/T);
    `masked_rate` >= 1 is the rate of masked weights under the full decay over the rate (1: the
    paper's).
    `second_moment` is what v is the mean square of ("momentum": the paper's).
    `implementation` "auto" takes Triton's kernels for parameters on an NVIDIA GPU.
    `importance` of a weight multiplies |w| where its mask is chosen (layers.py); it is not in the
    state dict, and weights that have one must not be sharded.

    Raises, from step(): RunError where shards cut groups of the pattern.
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
        decay_ramp: float = 1.0,
        masked_rate: float = 1.0,
        second_moment: Literal["momentum", "gradient"] = "momentum",
        implementation: Literal["auto", "reference", "triton"] = "auto",
        importance: Mapping[torch.nn.Parameter, torch.Tensor] | None = None,
    ) -> None:
        super().__init__(
            groups,
            {
                "lr": lr,
                "decay": decay,
                "total_steps": total_steps,
                "decay_ramp": decay_ramp,
                "masked_rate": masked_rate,
                "second_moment": second_moment,
                "betas": betas,
                "eps": eps,
                "mask_interval": mask_interval,
                "kept": pattern.kept,
                "group": pattern.group,
                "input_dim": None,
                "implementation": implementation,
                "step": 0,
                # Share of mask entries the last refresh changed, maybe still on its way as a tensor
                # of the device; None before the second.
                "flips": None,
            },
        )
        self._importance = dict(importance or {})
        self._forget()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update. Parameters without a gradient do not move; nothing waits for the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            if group["input_dim"] is not None and group["step"] % group["mask_interval"] == 0:
                self._refresh(group, self._implementation(index))
            group["step"] += 1
            weights = [weight for weight in group["params"] if weight.grad is not None]
            slots = self._slots(index, weights)
            grads = [local(weight.grad) for weight in weights]
            self._implementation(index).update(slots, grads, _numbers(group))
        return loss

    def masked_weights(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(weight, mask) of every sparsified parameter that has a mask yet."""
        for group in self.param_groups:
            for weight in group["params"]:
                if "mask" in self.state.get(weight, ()):
                    yield weight, self.state[weight]["mask"]

    @property
    def flips(self) -> float | None:
        """Share of mask entries changed by the last refresh; None before the second refresh.

        Over all ranks where weights are sharded. Waits for the device.
        """
        return flips.of_all(self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """The base class's; plain numbers in the groups."""
        return flips.as_numbers(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; the base class casts every state tensor to its parameter's dtype, masks too."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "mask" in state:
                state["mask"] = state["mask"].bool()

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle."""
        state: dict[str, Any] = super().__getstate__()
        return state | {"_importance": self._importance}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by load_state_dict, which gives groups and state alone, copy and pickle."""
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            # Not in checkpoints of the first release.
            group.setdefault("decay_ramp", 1.0)
            group.setdefault("masked_rate", 1.0)
            group.setdefault("second_moment", "momentum")
            group.setdefault("implementation", "auto")

    def _forget(self) -> None:
        """Start anew with what is derived from parameters and state."""
        self._implementations: dict[tuple[int, str], Implementation] = {}
        self._bound: dict[int, _Bound] = {}

    def _implementation(self, index: int) -> Implementation:
        """What computes the steps of group `index`."""
        group = self.param_groups[index]
        name = group["implementation"]
        if (index, name) not in self._implementations:
            self._implementations[index, name] = make_implementation(name, group["params"])
        return self._implementations[index, name]

    def _refresh(self, group: dict[str, Any], implementation: Implementation) -> None:
        """Masks of all weights of a group, and the share that changed; all ranks call it."""
        pattern, input_dim = Pattern(kept=group["kept"], group=group["group"]), group["input_dim"]
        names = group.get("param_names") or ["a weight"] * len(group["params"])
        first = not group["params"]
        by_ranks: dict[Any, list[torch.Tensor]] = {}
        for name, weight in zip(names, group["params"], strict=True):
            if "mask" not in self.state[weight]:
                check_groups_whole(weight, group=pattern.group, input_dim=input_dim, name=name)
                self.state[weight]["mask"] = torch.zeros_like(weight, dtype=torch.bool)
                first = True
            by_ranks.setdefault(ranks_of(weight), []).append(weight)
        changed = [
            (
                weights[0],
                refresh_masks(
                    implementation,
                    [self._masked(weight) for weight in weights],
                    pattern,
                    input_dim=input_dim,
                ),
            )
            for weights in by_ranks.values()
        ]
        total = sum(weight.numel() for weight in group["params"])
        group["flips"] = None if first else sum_over_ranks(changed).double() / total

    def _masked(self, weight: torch.Tensor) -> Masked:
        return Masked(
            weight=local(weight.detach()),
            mask=local(self.state[weight]["mask"]),
            importance=self._importance.get(weight),  # type: ignore[call-overload]
        )

    def _slots(self, index: int, weights: list[torch.Tensor]) -> list[Slot]:
        """Slots of `weights`, of group `index`: the last step's list unless a tensor is another.

        Cheap, since a small model's step takes the GPU less than a millisecond.
        """
        masked = self.param_groups[index]["input_dim"] is not None
        states = [self.state[weight] for weight in weights]
        for weight, state in zip(weights, states, strict=True):
            if "mu" not in state:
                state["mu"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
                state["nu"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        tensors = [(s["mu"], s["nu"], s["mask"] if masked else None) for s in states]
        identity = [
            (local(weight).data_ptr(), id(mu), id(nu), id(mask))
            for weight, (mu, nu, mask) in zip(weights, tensors, strict=True)
        ]
        bound = self._bound.setdefault(index, _Bound())
        if identity != bound.identity:
            bound.identity = identity
            bound.held = [tensor for three in tensors for tensor in three]
            bound.slots = [
                Slot(local(weight), local(mu), local(nu), None if mask is None else local(mask))
                for weight, (mu, nu, mask) in zip(weights, tensors, strict=True)
            ]
        return bound.slots


def _numbers(group: dict[str, Any]) -> StepNumbers:
    t, lr = group["step"], float(group["lr"])
    share = decay_share(t, group["total_steps"], ramp=group["decay_ramp"])
    return StepNumbers(
        t=t,
        lr=lr,
        masked_lr=lr * masked_speed(share, group["masked_rate"]),
        share=share,
        decay=group["decay"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=group["eps"],
        of_gradient=group["second_moment"] == "gradient",
    )
