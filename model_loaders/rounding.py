"""8-bit values with a scale per output channel.

  Shapes   values_NH [N, K/2] -> q_NH float8_e4m3fn or int8, scale_N1 fp32 [N, 1]
  Rule     scale = max(max|w| of the row / largest, 2^-126), q = w / scale in fp32, rounded to
           nearest even; a reader computes q * scale in fp32. largest is 448 or 127.

2^-126 is the smallest normal fp32: it keeps the scale of a row of zeros, or of subnormals, one
that can be divided by.
"""

import torch

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def quantize_rows(values_NH: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Round finite values to `dtype`, float8_e4m3fn or int8; returns them and their scales.

    A value comes back within half a step: of scale for int8; for float8 of scale * 2^(e-3), where
    2^e <= |w| / scale and e >= -6.
    """
    wide = values_NH.float()
    scale_N1 = (wide.abs().amax(dim=1, keepdim=True) / LARGEST[dtype]).clamp(min=SMALLEST_SCALE)
    wide = wide / scale_N1
    if dtype == torch.int8:
        return wide.round().to(dtype), scale_N1
    q_NH = wide.to(dtype)
    # What rounds to zero from below is -0.0, which no packed form holds.
    return q_NH.float().masked_fill_(q_NH.float() == 0, 0.0).to(dtype), scale_N1


def dequantize_rows(q_NH: torch.Tensor, scale_N1: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """q * scale in fp32, rounded once to `dtype`."""
    return (q_NH.float() * scale_N1).to(dtype)
