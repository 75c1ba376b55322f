"""New masks (Eq. 6) of many weights at once, by whatever computes them fastest where they are."""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cast_serve.trainer.adams.rule import Implementation, Reference
from cast_serve.trainer.config import Pattern

# Weights times the norms of their inputs that there are at once: 1 GiB in fp32.
RANKED_AT_ONCE = 2**28


@dataclass(frozen=True, kw_only=True)
class Masked:
    """A weight, its mask, and the norms of its inputs where those weigh in, shaped to multiply."""

    weight: torch.Tensor
    mask: torch.Tensor
    importance: torch.Tensor | None = None


def make_implementation(name: str, weights: Sequence[torch.Tensor]) -> Implementation:
    """The rule's `Implementation` of that name; "auto" is Triton's for weights on an NVIDIA GPU."""
    if name == "auto":
        on_gpu = any(weight.is_cuda for weight in weights[:1])
        name = "triton" if on_gpu and importlib.util.find_spec("triton") else "reference"
    if name == "reference":
        return Reference()
    # Triton is there where torch has CUDA, and not everywhere else.
    from cast_serve.trainer.adams.fused import Fused

    return Fused()


def refresh_masks(
    implementation: Implementation, masked: Sequence[Masked], pattern: Pattern, *, input_dim: int
) -> torch.Tensor:
    """Recompute the masks, in place; int64 count of the entries that changed, not waited for.

    Args:
        masked: one or more, all on one device.
        input_dim: that groups run along, 1 for nn.Linear and 0 for Conv1D.
    """
    changed = torch.zeros((), dtype=torch.int64, device=masked[0].weight.device)
    for portion in _portions(masked):
        weights = [one.weight.detach() for one in portion]
        ranked = [
            weight if one.importance is None else weight * one.importance
            for weight, one in zip(weights, portion, strict=True)
        ]
        masks = [one.mask for one in portion]
        changed += implementation.refresh(ranked, masks, pattern, input_dim=input_dim)
    return changed


def _portions(masked: Sequence[Masked]) -> Iterator[list[Masked]]:
    """`masked` in turn, few enough at once for their products with the norms to have room."""
    portion: list[Masked] = []
    size = 0
    for one in masked:
        own = 0 if one.importance is None else one.weight.numel()
        if portion and size + own > RANKED_AT_ONCE:
            yield portion
            portion, size = [], 0
        portion.append(one)
        size += own
    yield portion
