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
        # Mean cross-entropy between the last two checks.
        self._usual = 0.0
        self._sums = torch.zeros(4, dtype=torch.float64, device=processes.device)

    def see(self, loss: torch.Tensor, cross_entropy: torch.Tensor, norm: torch.Tensor) -> None:
        """The means of a step in this process, and the norm of its gradient."""
        self._sums += torch.stack((loss, cross_entropy, norm * 0, torch.ones_like(loss)))

    def check(self, run_dir: Path, step: int) -> None:
        """Look at the steps since the last check.

        Raises:
            RunError: in every process; names the last checkpoint before it.
        """
        loss, cross_entropy, broken, count = self.processes.sum(self._sums.clone()).tolist()
        self._sums.zero_()
        if not count:
            return
        mean, self._usual = loss / count, cross_entropy / count
        if math.isfinite(mean) and math.isfinite(broken) and mean <= self.limit:
            return
        if not math.isfinite(mean):
            found = f"the loss is {mean}"
        elif not math.isfinite(broken):
            found = "the gradient is not finite"
        else:
            found = f"the loss is {mean:.3g}, above the limit of {self.limit:.3g},"
        raise RunError(_said(f"{found} by step {step}", run_dir))

    def check_update(self, run_dir: Path, step: int, cross_entropy: float) -> None:
        """Look at the model as `step`, just checked, has left it: its losses are of before that.

        Args:
            cross_entropy: of the model now, nats per token. It may be far above a guess where it
                was so before: a loss of KL alone does not ask for it.

        Raises:
            RunError: that is above the limit and a nat worse than it was, or no number; names the
                last checkpoint before it.
        """
        worst = max(self.limit, self._usual + 1)
        if not cross_entropy <= worst:
            found = f"the update of step {step} takes the cross-entropy to {cross_entropy:.3g}"
            raise RunError(_said(f"{found}, above {worst:.3g}", run_dir))


def _said(found: str, run_dir: Path) -> str:
    last = last_checkpoint(run_dir)
    good = f"the last good checkpoint is {last}" if last else "there is no checkpoint before it"
    return f"{found}; {good}; start again with a lower lr or a longer warmup"
