"""N:M patterns by magnitude: which entries of each group survive.

The mask of CAST (arXiv 2509.25996, Eq. 6) and of one-shot magnitude pruning: in each group of
`group` consecutive columns of a row the `kept` largest |w| survive, and of equals the leftmost.
A threshold with >= would keep three of four on ties; a stable sort does not.
"""

import torch

# The six ways to keep two of four columns, as nibbles of a bitmask.
_PAIRS = torch.tensor([0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100], dtype=torch.uint8)


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
    groups = weight.detach().abs().reshape(-1, group)
    order = groups.argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(1, order[:, :kept], True)
    return mask.reshape(weight.shape)


def random_mask(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Bitmask uint8 [rows, columns/8] of random pairs, on the generator's device.

    For tests and timings; columns % 8 == 0.
    """
    device = generator.device
    choice = torch.randint(6, (2, rows, columns // 8), generator=generator, device=device)
    low, high = _PAIRS.to(device)[choice]
    return low | high << 4
