"""2:4 packing: a weight with at most two non-zeros in every four, as values and a bitmask.

  Shapes   w_NK -> values_NH (H = K/2, dtype of w), mask_NB uint8 (B = K/8)
  Layout   A group is four consecutive columns of a row. values_NH is row-major and holds the two
           kept entries of each group in column order. Bit i of byte j of a mask row says that
           column 8j+i is kept (little-endian), so a byte is two groups and every group has exactly
           two bits set. This is the `sparse-24-bitmask` layout of compressed-tensors.
  Needs    K % 8 == 0. Any device; any dtype that compares with zero.

A group with fewer than two non-zeros still keeps two columns: its non-zeros, then the leftmost
zeros. `-0.0` is a zero and comes back as `+0.0`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

GROUP = 4
KEPT = 2
COLUMNS_PER_BYTE = 8

# Work goes through row blocks of this many entries: the temporaries (masks, codes, indices) would
# otherwise be several times the weight.
BLOCK_ENTRIES = 1 << 22


class PatternError(ValueError):
    """A group keeps more than two of four, or a bitmask group does not keep exactly two."""


@dataclass(frozen=True, kw_only=True)
class Offender:
    """A group that breaks the pattern: where it is and what it holds (weight entries or bits)."""

    row: int
    column: int
    values: tuple[float, ...]

    def __str__(self) -> str:
        shown = ", ".join(f"{value:g}" for value in self.values)
        return f"row {self.row}, columns {self.column}-{self.column + GROUP - 1}: [{shown}]"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `check` and `check_mask` found: groups seen, groups at fault, and the first few."""

    groups: int
    faulty: int
    first: tuple[Offender, ...]

    @property
    def ok(self) -> bool:
        return self.faulty == 0


def _tables() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each 4-bit set of non-zeros: the bits kept, and the two columns kept, ascending.

    A set of three or four is never looked up: `pack` refuses it first.
    """
    kept, first, second = [], [], []
    for code in range(16):
        nonzero = [column for column in range(GROUP) if code >> column & 1]
        zero = [column for column in range(GROUP) if not code >> column & 1]
        low, high = sorted((nonzero + zero)[:KEPT])
        kept.append(1 << low | 1 << high)
        first.append(low)
        second.append(high)
    return (
        torch.tensor(kept, dtype=torch.uint8),
        torch.tensor(first, dtype=torch.uint8),
        torch.tensor(second, dtype=torch.uint8),
    )


_KEPT_BITS, _FIRST, _SECOND = _tables()
_BIT_COUNT = torch.tensor([code.bit_count() for code in range(16)], dtype=torch.uint8)


def check_shape(shape: torch.Size | tuple[int, ...]) -> None:
    """Raise ValueError unless `shape` is that of a weight 2:4 can pack: [N, K] with K % 8 == 0."""
    if len(shape) != 2:
        raise ValueError(f"a 2:4 weight is [N, K], got shape {list(shape)}")
    if shape[1] % COLUMNS_PER_BYTE:
        raise ValueError(f"K={shape[1]} is not a multiple of {COLUMNS_PER_BYTE}")


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack a 2:4 weight.

    Args:
        weight: [N, K], K % 8 == 0, at most two non-zeros in each group of four columns; need not
            be contiguous.

    Returns:
        values [N, K/2] in the dtype of `weight`, and bitmask uint8 [N, K/8], on its device.

    Raises:
        ValueError: wrong rank or K.
        PatternError: a group has more than two non-zeros; names the first.
    """
    check_shape(weight.shape)
    rows, columns = weight.shape
    values = weight.new_empty(rows, columns // 2)
    mask = torch.empty(rows, columns // COLUMNS_PER_BYTE, dtype=torch.uint8, device=weight.device)
    kept_bits, first, second = (t.to(weight.device) for t in (_KEPT_BITS, _FIRST, _SECOND))
    for block in _row_blocks(rows, columns):
        groups = weight[block].reshape(-1, GROUP)
        code = _nonzero_code(groups)
        if (_BIT_COUNT.to(code.device)[code] > KEPT).any():
            raise PatternError(_describe(check(weight)))
        columns_kept = torch.stack((first[code], second[code]), dim=1).long()
        picked = groups.gather(1, columns_kept)
        # + 0.0 would turn -0.0 into 0.0 as well, but not in every dtype on every device.
        picked = torch.where(picked == 0, torch.zeros_like(picked), picked)
        values[block] = picked.reshape(values[block].shape)
        nibbles = kept_bits[code].reshape(*mask[block].shape, 2)
        mask[block] = nibbles[..., 0] | nibbles[..., 1] << 4
    return values, mask


def unpack(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Dense [N, K] weight of `values` [N, K/2] and `mask` uint8 [N, K/8]; inverse of `pack`.

    The mask is trusted to have two bits set in every group: `check_mask` says whether it has.

    Raises:
        ValueError: shapes or dtype do not belong together.
    """
    check_packed_shapes(tuple(values.shape), tuple(mask.shape))
    if mask.dtype != torch.uint8:
        raise ValueError(f"a bitmask is uint8, got {str(mask.dtype).removeprefix('torch.')}")
    rows, columns = values.shape[0], values.shape[1] * 2
    weight = values.new_zeros(rows, columns)
    for block in _row_blocks(rows, columns):
        code = _nibbles(mask[block])
        groups = values.new_zeros(code.numel(), GROUP)
        groups.scatter_(1, _kept_columns(code), values[block].reshape(-1, KEPT))
        weight[block] = groups.reshape(weight[block].shape)
    return weight


def check(weight: torch.Tensor, *, limit: int = 8) -> Report:
    """Count the groups of `weight` [N, K] with more than two non-zeros; keep the first `limit`.

    K need only be a multiple of four here: the pattern exists before any packing does.

    Raises:
        ValueError: not a matrix, or K is not a multiple of four.
    """
    if weight.dim() != 2:
        raise ValueError(f"a 2:4 weight is [N, K], got shape {list(weight.shape)}")
    rows, columns = weight.shape
    if columns % GROUP:
        raise ValueError(f"K={columns} is not a multiple of {GROUP}")

    def faults(block: slice) -> tuple[torch.Tensor, torch.Tensor]:
        groups = weight[block].reshape(-1, GROUP)
        return _BIT_COUNT.to(weight.device)[_nonzero_code(groups)] > KEPT, groups

    return _scan(rows, columns, faults, limit)


def check_mask(mask: torch.Tensor, *, limit: int = 8) -> Report:
    """Count the groups of a bitmask [N, K/8] whose number of set bits is not two."""
    rows, columns = mask.shape[0], mask.shape[1] * COLUMNS_PER_BYTE
    bits = torch.arange(GROUP, dtype=torch.uint8, device=mask.device)

    def faults(block: slice) -> tuple[torch.Tensor, torch.Tensor]:
        code = _nibbles(mask[block])
        groups = code[:, None].to(torch.uint8) >> bits & 1
        return _BIT_COUNT.to(mask.device)[code] != KEPT, groups

    return _scan(rows, columns, faults, limit)


def keeps_two(mask: torch.Tensor) -> torch.Tensor:
    """bool [N, K/8]: whether both groups of a bitmask byte keep exactly two columns.

    What `check_mask` finds, without where: a few passes over bytes, and nothing is awaited.
    """
    # Bits counted in pairs, then in nibbles, all side by side in their byte.
    pairs = (mask & 0x55) + (mask >> 1 & 0x55)
    nibbles = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return nibbles == 0x22


def check_packed_shapes(values: tuple[int, ...], mask: tuple[int, ...]) -> None:
    """Raise ValueError unless [N, K/2] values and a [N, K/8] bitmask belong together."""
    if len(values) != 2 or len(mask) != 2:
        raise ValueError(f"values {list(values)} and bitmask {list(mask)} must be matrices")
    if values[0] != mask[0] or values[1] != mask[1] * GROUP:
        raise ValueError(
            f"values {list(values)} and bitmask {list(mask)} do not belong together: "
            "expected [N, K/2] and [N, K/8]"
        )


def _kept_columns(code: torch.Tensor) -> torch.Tensor:
    """Nibbles [G] with two bits set -> the columns of those, int64 [G, 2], ascending.

    Computed, since a CUDA graph cannot capture a table's copy to the device.
    """
    before = ((code & 0b0001) == 0).to(torch.uint8) * (1 + ((code & 0b0011) == 0))
    behind = ((code & 0b1000) == 0).to(torch.uint8) * (1 + ((code & 0b1100) == 0))
    return torch.stack((before, GROUP - 1 - behind), dim=1).long()


def _row_blocks(rows: int, columns: int) -> list[slice]:
    step = max(1, BLOCK_ENTRIES // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _nonzero_code(groups: torch.Tensor) -> torch.Tensor:
    """[G, 4] entries -> [G] int32, bit i set where entry i is not zero (NaN is not zero)."""
    nonzero = (groups != 0).to(torch.int32)
    return nonzero[:, 0] | nonzero[:, 1] << 1 | nonzero[:, 2] << 2 | nonzero[:, 3] << 3


def _nibbles(mask: torch.Tensor) -> torch.Tensor:
    """Mask bytes [n, B] -> [n * B * 2] int32 nibbles, one a group, in column order."""
    return torch.stack((mask & 0xF, mask >> 4), dim=-1).flatten().to(torch.int32)


def _scan(
    rows: int,
    columns: int,
    faults: Callable[[slice], tuple[torch.Tensor, torch.Tensor]],
    limit: int,
) -> Report:
    groups_per_row, count = columns // GROUP, 0
    first: list[Offender] = []
    for block in _row_blocks(rows, columns):
        faulty, groups = faults(block)
        where = faulty.nonzero().flatten()
        count += where.numel()
        for index in where[: limit - len(first)].tolist():
            row, group = divmod(index, groups_per_row)
            first.append(
                Offender(
                    row=block.start + row,
                    column=group * GROUP,
                    values=tuple(float(value) for value in groups[index].tolist()),
                )
            )
    return Report(groups=rows * groups_per_row, faulty=count, first=tuple(first))


def _describe(report: Report) -> str:
    return (
        f"{report.faulty} of {report.groups} groups have more than two non-zeros, "
        f"the first at {report.first[0]}"
    )
