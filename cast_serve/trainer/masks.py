"""Masks over a weight as the optimizer sees it, and what they say about a run's progress.

A weight is [N, K] in nn.Linear and [K, N] in GPT-2's Conv1D. Groups run along the input dimension
K, so a mask is computed on the [N, K] view and stored in the layout of the weight.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from cast_serve.kernels.pattern import nm_mask
from cast_serve.trainer.config import Pattern
from cast_serve.trainer.sharding import local, sum_over_ranks


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Diagnostics over all sparsified weights (unscaled).

    Attributes:
        sparse_weight_ratio: S_t = ||W*M||_1 / ||W||_1, which goes to 1.
        masked: mean |w| of the weights to be pruned, which goes to 0.
        kept: mean |w| of the survivors.
    """

    sparse_weight_ratio: float
    masked: float
    kept: float


def weight_mask(weight: torch.Tensor, pattern: Pattern, *, input_dim: int) -> torch.Tensor:
    """Boolean mask of the survivors (Eq. 6), in the layout of `weight`.

    Args:
        weight: a matrix whose dimension `input_dim` (0 or 1) is a multiple of the group.
    """
    rows = weight.detach() if input_dim == 1 else weight.detach().t()
    mask = nm_mask(rows, kept=pattern.kept, group=pattern.group)
    return mask if input_dim == 1 else mask.t().contiguous()


def progress(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Progress:
    """Progress over (weight, mask) pairs of equal shapes; sums are taken in fp64.

    Of sharded weights (DTensors) all shards count: every rank calls this, and gets the same.
    """
    parts = []
    total_count = 0
    for weight, mask in pairs:
        magnitude, survives = local(weight.detach()).abs(), local(mask)
        sums = (magnitude, magnitude * survives, survives)
        # On the device: one wait at the end instead of three a weight.
        parts.append((weight, torch.stack([x.sum(dtype=torch.float64) for x in sums])))
        total_count += weight.numel()
    total_sum, kept_sum, kept_count = sum_over_ranks(parts).tolist() if parts else (0.0, 0.0, 0.0)
    return Progress(
        # All-zero weights have nothing left to prune.
        sparse_weight_ratio=kept_sum / total_sum if total_sum else 1.0,
        masked=(total_sum - kept_sum) / max(1, total_count - kept_count),
        kept=kept_sum / max(1, kept_count),
    )
