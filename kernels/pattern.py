"""N:M patterns by magnitude: which entries of each group survive.

The mask of CAST (arXiv 2509.25996, Eq. 6) and of one-shot magnitude pruning: in each group of
`group` consecutive columns of a row the `kept` largest |w| survive, and of equals the leftmost.
A threshold with >= would keep three of four on ties; ranks do not.
"""

import math

import torch

# The six ways to keep two of four columns, as nibbles of a bitmask.
_PAIRS = torch.tensor([0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100], dtype=torch.uint8)

# Integers as wide as a float of so many bytes.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def nm_mask(weight: torch.Tensor, *, kept: int = 2, group: int = 4) -> torch.Tensor:
    """Boolean mask of the `kept` largest magnitudes in every `group` columns.

    Args:
        weight: [N, K], any floating dtype, K % group == 0.

    Returns:
        bool [N, K] with exactly `kept` True in every group.

    Raises:
        ValueError: `kept` and `group` are no pattern, or K is not a multiple of `group`.
    """
    if not 0 < kept < group:
        raise ValueError(f"{kept}:{group} is not a pattern: needs 0 < N < M")
    if weight.dim() != 2 or weight.shape[1] % group:
        raise ValueError(
            f"{kept}:{group} needs a matrix whose columns are a multiple of {group}, "
            f"got {list(weight.shape)}"
        )
    # Bits of positive floats are in the order of their values. NaN, of any payload, is the largest.
    integer = _BITS[weight.element_size()]
    infinite = int(torch.tensor(math.inf, dtype=weight.dtype, device="cpu").view(integer))
    bits = weight.detach().abs().view(integer).clamp_(max=infinite + 1)
    columns = bits.reshape(-1, group).unbind(1)
    # Every pair is compared: a sort of millions of groups so small is slow.
    beaten_by = [torch.zeros_like(column, dtype=torch.uint8) for column in columns]
    for right in range(1, group):
        for left in range(right):
            larger = columns[right] > columns[left]
            beaten_by[left] += larger
            beaten_by[right] += ~larger
    return torch.stack([losses < kept for losses in beaten_by], dim=1).view(weight.shape)


def random_mask(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Bitmask uint8 [rows, columns/8] of random pairs, on the generator's device.

    For tests and timings; columns % 8 == 0.
    """
    device = generator.device
    choice = torch.randint(6, (2, rows, columns // 8), generator=generator, device=device)
    low, high = _PAIRS.to(device)[choice]
    return low | high << 4
