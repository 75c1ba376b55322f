"""How mma_sp lays weights, metadata and tokens over the lanes of a warp.

  Shapes   values_NH (H = K/2) row-major, mask_NB uint8 (B = K/8) -> metadata int32 [X]
  Words    32 bits: two 16-bit elements. A *step* is 128 bytes of an x row, 64 columns: 16 words of
           a values row (a word is the kept half of one group) and 32 words of an x row. A *tile* is
           16 rows of W.
  Source   PTX ISA, "Warp-level matrix instructions for sparse matrices: mma.sp.m16n8k32".

Lane = 4g + t. The instruction wants of lane (g, t) logical groups t and t+4 of rows g and g+8, but
a 16-byte load gives a lane words 4t..4t+3 of one row. The order of groups along K is free as long
as W, metadata and x agree, so a step is two instructions h = 0, 1 in which

    logical group q  is  group 4 (q % 4) + 2h + q // 4  of the step

and words 2h and 2h+1 of a lane's loads are its A registers of instruction h as they come:

    words of a values row, one step     0  1  2  3 | 4  5  6  7 | 8  9 10 11 |12 13 14 15
    loaded by lane t =                  0          | 1          | 2          | 3
    instruction h                       0  0  1  1 | 0  0  1  1 | 0  0  1  1 | 0  0  1  1
    logical group q                     0  4  0  4 | 1  5  1  5 | 2  6  2  6 | 3  7  3  7
"""

import torch

from cast_serve.kernels.metadata import PADDING_CODE, group_codes

# Columns of a step, rows of a tile, tokens of an instruction.
STEP = 64
TILE = 16
TOKENS = 8

# Steps whose metadata words lie side by side in a lane: one 16-byte load.
STEPS_TOGETHER = 4


def metadata_layout(mask: torch.Tensor) -> torch.Tensor:
    """Metadata int32 [N/16 * ceil(K/256) * 128] of a bitmask uint8 [N, K/8], on its device.

    Index [tile, step // 4, lane, step % 4]. Nibble i of a word's low half is the code of row g,
    group 4i+t of the step; the high half is row g+8. So lanes t = 0, 1 hold what instruction 0
    reads (selector 0) and lanes t = 2, 3 what instruction 1 reads (selector 1). N*K/8 bytes if
    K % 256 == 0; otherwise K is padded up to that.

    Raises:
        ValueError: N % 16 or K % 64.
    """
    rows, columns = mask.shape[0], mask.shape[1] * 8
    if rows % TILE or columns % STEP:
        raise ValueError(
            f"mma_sp metadata needs N % {TILE} == 0 and K % {STEP} == 0, got N={rows} K={columns}"
        )
    together = STEPS_TOGETHER * STEP
    padded = -(-columns // together) * together
    codes = torch.nn.functional.pad(
        group_codes(mask), (0, (padded - columns) // 4), value=PADDING_CODE
    )
    # rows are (tile, hi, g); groups are (step // 4, step % 4, byte, nibble of the byte, t)
    nibbles = codes.view(rows // TILE, 2, 8, padded // together, STEPS_TOGETHER, 2, 2, 4)
    halves = nibbles[..., 0, :] | nibbles[..., 1, :] << 4
    # [tile, hi, g, step // 4, step % 4, byte, t] -> [tile, step // 4, g, t, step % 4, hi, byte]
    return halves.permute(0, 3, 2, 6, 4, 1, 5).flatten().view(torch.int32)
