"""Stops a run whose loss is no number any more, or worse than a guess.

Figures are kept on the device, and looked at when there is something to log or to save: a check of
every step would have the GPU wait for it.
"""

import math
from pathlib import Path

import torch

from cast_serve.trainer.errors import RunError
from cast_serve.trainer.processes import Processes
from cast_serve.trainer.run_dir import last_checkpoint


class Guard:
    """Watches loss and gradient norm of every step.

    Args:
        limit: nats per token that the mean loss since the last check must not exceed.
    """

    def __init__(self, processes: Processes, *, limit: float) -> None:
        self.processes = processes
        self.limit = limit
        self._sums = torch.zeros(3, dtype=torch.float64, device=processes.device)

    def see(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """The mean loss of a step in this process, and the norm of its gradient."""
        self._sums += torch.stack((loss, norm * 0, torch.ones_like(loss)))

    def check(self, run_dir: Path, step: int) -> None:
        """Look at the steps since the last check.

        Raises:
            RunError: in every process; names the last checkpoint before it.
        """
        loss, broken, count = self.processes.sum(self._sums.clone()).tolist()
        self._sums.zero_()
        if not count:
            return
        mean = loss / count
        if math.isfinite(mean) and math.isfinite(broken) and mean <= self.limit:
            return
        if not math.isfinite(mean):
            found = f"the loss is {mean}"
        elif not math.isfinite(broken):
            found = "the gradient is not finite"
        else:
            found = f"the loss is {mean:.3g}, above the limit of {self.limit:.3g},"
        last = last_checkpoint(run_dir)
        good = f"the last good checkpoint is {last}" if last else "there is no checkpoint before it"
        raise RunError(
            f"{found} by step {step}; {good}; start again with a lower lr or a longer warmup"
        )
