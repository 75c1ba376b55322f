"""Weights must be finite: the first NaN or infinity of a tensor, and where it is."""

import math

import torch

from cast_serve.kernels.packing import COLUMNS_PER_BYTE
from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.model_loaders.layers import BIAS, SCALE, VALUES, WEIGHT

# Other tensors are buffers, and an attention mask holds infinities by design.
_CHECKED = (WEIGHT, BIAS, VALUES, SCALE)


def first_nonfinite(tensor: torch.Tensor) -> tuple[tuple[int, ...], float] | None:
    """Index and value of the first NaN or infinity of a floating tensor, None if there is none."""
    if not tensor.numel():
        return None
    # aminmax needs no temporaries and carries NaN through; it has no float8 kernel.
    extremes = torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor)
    if all(math.isfinite(extreme.item()) for extreme in extremes):
        return None
    if tensor.dim() == 0:
        return (), tensor.item()
    for row, entries in enumerate(tensor):
        finite = torch.isfinite(entries.float())
        if not finite.all():
            rest = tuple((~finite).nonzero()[0].tolist())
            return (row, *rest), float(entries[rest])
    raise AssertionError("an extreme was not finite, so an entry is not")


def require_finite(checkpoint: Checkpoint, name: str, tensor: torch.Tensor) -> None:
    """Raise CheckpointError naming tensor, row and column if a weight is NaN or infinite.

    Args:
        tensor: the contents of `name`, as stored.
    """
    if not tensor.is_floating_point() or not name.endswith(_CHECKED):
        return
    if found := first_nonfinite(tensor):
        index, value = found
        raise checkpoint.error(name, f"{value} at {place(index)}; weights must be finite")


def place(index: tuple[int, ...]) -> str:
    if len(index) == 2:
        return f"row {index[0]}, column {index[1]}"
    return f"index {', '.join(map(str, index))}"


def dense_column(mask_row: torch.Tensor, slot: int) -> int:
    """Column of the dense weight that entry `slot` of a packed row holds; mask_row is [K/8]."""
    kept = [
        COLUMNS_PER_BYTE * byte + bit
        for byte, bits in enumerate(mask_row.tolist())
        for bit in range(COLUMNS_PER_BYTE)
        if bits >> bit & 1
    ]
    return kept[slot]
