"""fp32 references that tests and benchmarks judge kernels against, in plain torch.

Shapes   x_MK, values_NH (H = K/2), mask_NB uint8 (B = K/8), bias_N -> y_MN.
"""

import torch

from cast_serve.kernels.packing import unpack


def spmm_ref(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x @ W.T + bias with 2:4-packed W, all in fp32, with one rounding at the end.

    Args:
        x: [..., K].
        values: [N, K/2], as `pack` gives them.
        mask: uint8 [N, K/8].
        bias: [N].

    Returns:
        [..., N] in the dtype of `x`.

    Raises:
        ValueError: shapes do not belong together.
    """
    weight = unpack(values, mask).float()
    rows, columns = weight.shape
    if x.shape[-1:] != (columns,):
        raise ValueError(f"x {list(x.shape)} does not fit W [{rows}, {columns}]: needs [..., K]")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias {list(bias.shape)} does not fit W [{rows}, {columns}]: needs [N]")
    y = x.float() @ weight.t()
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype)
