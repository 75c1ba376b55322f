"""How the rate and the decay move over a run, and how far weights can travel on them.

Steps are t = 1..T as in the paper; the first update is t = 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from cast_serve.trainer.errors import RunError

# The schedule is summed step by step: beyond this the plan alone would take minutes.
_MOST_STEPS = 10**8


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up, then cosine to `floor` of the peak rate; the decay's share rises linearly.

    `decay_ramp` is the share of the steps over which it goes from 0 to 1, `masked_rate` the rate of
    masked weights under the full decay as a multiple of the others'; both are 1 in the paper.
    """

    steps: int
    warmup: float
    floor: float
    decay_ramp: float = 1.0
    masked_rate: float = 1.0

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup * self.steps)

    def rate(self, t: int) -> float:
        """lr_t as a share of the peak; 1/w at t = 1 of w warm-up steps, `floor` at t = T.

        The first update of AdamS is 10 times the rate (docs/method.md, AdamS, 1), so the warm-up
        starts at its first share and not at the peak.
        """
        if t <= self.warmup_steps:
            return t / self.warmup_steps
        span = max(1, self.steps - self.warmup_steps)
        progress = min(1.0, (t - self.warmup_steps) / span)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))

    def decay(self, t: int) -> float:
        """a_t, the share of the decay in the update of a masked weight (Eq. 7)."""
        return decay_share(t, self.steps, ramp=self.decay_ramp)

    def reach(self) -> float:
        """sum_t rate_t * s_t * a_t: how far the decay carries a weight at a peak rate of 1."""
        return math.fsum(
            self.rate(t) * masked_speed(self.decay(t), self.masked_rate) * self.decay(t)
            for t in range(1, self.steps + 1)
        )

    def factor(self) -> Callable[[int], float]:
        """The rate for torch's LambdaLR, which counts updates from 0."""
        return lambda done: self.rate(done + 1)


def whole_steps(budget: float) -> int:
    """Optimizer steps of `budget` of them; a part of a step is rounded up.

    Raises:
        RunError: more than any run could take.
    """
    if budget > _MOST_STEPS:
        raise RunError(f"the budget is {budget:.3g} steps; give one of at most {_MOST_STEPS:.3g}")
    return max(1, math.ceil(budget))


def decay_share(t: int, steps: int, *, ramp: float) -> float:
    """a_t = t / (ramp * T), held at 1 from there on; the paper's t/T with a ramp of 1."""
    return min(1.0, t / (ramp * steps))


def masked_speed(share: float, masked_rate: float) -> float:
    """s_t = 1 + a_t (masked_rate - 1), the rate of masked weights as a multiple of lr_t."""
    return 1 + share * (masked_rate - 1)
