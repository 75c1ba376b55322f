"""Mean loss over non-overlapping windows, each seen without the text before it.

A window of `context` tokens predicts context-1 of them: the convention of the SparseGPT, Wanda and
CAST tables. Always in eval mode; the model's mode is restored.
"""

import math

import torch
from torch import nn

from cast_serve.trainer.head import loss_head
from cast_serve.trainer.objective import Objective
from cast_serve.trainer.processes import ALONE, Processes


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    windows: torch.Tensor,
    *,
    batch_size: int = 8,
    processes: Processes = ALONE,
) -> float:
    """Mean cross-entropy, nats per predicted token, of `windows` int [count, context].

    Args:
        processes: they share the windows, and every one gets the mean over all.
    """
    training = model.training
    model.eval()
    objective, head = Objective(eta=0.0), loss_head(model)
    # An offloaded model's parameters are in host memory, its work is not.
    device = processes.device if processes.count > 1 else next(model.parameters()).device
    own = windows[processes.rank :: processes.count]
    total = torch.zeros((), dtype=torch.float64, device=device)
    # A sharded model needs every process in every pass, also one that has no window left.
    most = -(-len(windows) // processes.count)
    for start in range(0, most, batch_size):
        part = own[start : start + batch_size]
        ids = (part if len(part) else windows[:1]).long().to(device)
        total += objective(model, head, ids, None).ce.double() * len(part)
    model.train(training)
    return processes.sum(total).item() / len(windows)


def to_perplexity(loss: float) -> float:
    """exp, with inf where a ruined model's loss overflows it."""
    return math.exp(loss) if loss < 700 else math.inf
