"""Inlets: the names under which the parts of a layer arrive while it is loaded.

A checkpoint stores a part as a dense `weight` (in the training form with `cast_scale`), or as
`compressed` values and a `bitmask` (in 8 bits with `weight_scale`; `shape` repeats what they say).
A layer has an inlet for each of these names; only those that it is loaded into have their size.
"""

import torch

from cast_serve.kernels.packing import COLUMNS_PER_BYTE

INLETS = ("weight", "cast_scale", "compressed", "bitmask", "shape", "weight_scale")
# Of the others it is the model's.
_DTYPES = {
    **dict.fromkeys(("cast_scale", "weight_scale"), torch.float32),
    "bitmask": torch.uint8,
    "shape": torch.int64,
}

# Each part arrives by exactly one of these. At a reload vLLM counts how many elements arrive, and
# takes a layer as loaded once that is the size of all its parameters. That would be too early where
# a scale comes last, and a weight [N, K] has another size than values and bitmask. So an arriving
# part counts 1: more than 0, which is a layer without weights, and never all. vLLM then loads the
# layer when everything has been read.
_COUNTED = ("weight", "compressed")


def loaded_into(columns: int, *, sparse: bool) -> dict[str, int]:
    """The inlets that a layer of K = `columns` is loaded into, and how many columns each has."""
    if sparse:
        return {"compressed": columns // 2, "bitmask": columns // COLUMNS_PER_BYTE}
    return {"weight": columns}


def empty_inlet(name: str, dtype: torch.dtype, *, rows: int, columns: int | None) -> torch.Tensor:
    """An inlet [rows, columns] in which nothing has arrived; of the least size without `columns`.

    Args:
        dtype: the model's.
    """
    shape = (rows, columns) if columns is not None else (int(name in _COUNTED),)
    return torch.full(shape, unread(name), dtype=_DTYPES.get(name, dtype))


def unread(name: str) -> int:
    """What stands for parts that have not been read: a valid bitmask, and finite values."""
    # Columns 0 and 1 of every group.
    return 0b0011_0011 if name == "bitmask" else 0


def count(name: str) -> None:
    """Do what vLLM counts as one element loaded, where that inlet is counted."""
    if name in _COUNTED:
        torch.empty(1, device="meta").copy_(torch.empty(1, device="meta"))
