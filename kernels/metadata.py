"""Metadata: where each kept value sits, in the order in which a kernel's threads read it.

  Shapes   mask_NB uint8 (B = K/8), as `pack` gives it -> one layout's tensor
  Code     Four bits a group of four columns: first kept column | second << 2, the form in which
           `mma.sp` and `wgmma.mma_async.sp` take it (PTX ISA, "Sparse matrix storage").

A layout is a function of the mask alone, so several kernels may read the same values [N, K/2]
through metadata of their own.
"""

import torch

# The mask nibble of a group -> its code; nibbles without two bits set are refused before.
_CODES = torch.tensor(
    [
        next(
            (a | b << 2 for a in range(4) for b in range(a + 1, 4) if nibble == 1 << a | 1 << b),
            0b0100,
        )
        for nibble in range(16)
    ],
    dtype=torch.uint8,
)

# Columns 0 and 1: the code of groups that pad a tile.
PADDING_CODE = 0b0100


def group_codes(mask: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [N, K/4] of a bitmask uint8 [N, K/8], on its device."""
    nibbles = torch.stack((mask & 0xF, mask >> 4), dim=-1).flatten(1)
    return _CODES.to(mask.device)[nibbles.int()]
