"""SparseGPT (arXiv 2301.00774): prune, and let the columns to the right make up for it.

With H = X X^T + damping, H^-1 = U^T U (Cholesky, U upper) and columns taken from left to right, the
second-order optimum for setting w[c] to 0 with columns before c fixed is

    error  = w[c] / U[c, c]                 loss = error^2, which chooses the mask
    w[c:] -= error * U[c, c:]

Masks of an N:M group are chosen for the whole group when its first column is reached. Updates
reach the rest of a block of columns at once and all columns beyond it together, as one product.
"""

import torch

from cast_serve.kernels.pattern import nm_mask
from cast_serve.trainer.config import Pattern

_BLOCK_COLUMNS = 128


def prune_sparsegpt_(
    weight: torch.Tensor, hessian: torch.Tensor, pattern: Pattern, *, damping: float = 0.01
) -> None:
    """Prune weight [N, K], fp32, in place, and adjust what survives.

    Args:
        hessian: sum over tokens of x x^T, fp32 [K, K]; its scale does not matter.
        damping: added to the diagonal, as a share of its mean.

    Raises:
        torch.linalg.LinAlgError: the Hessian is not finite.
    """
    columns, group = weight.shape[1], pattern.group
    hessian = hessian.clone()
    # An input that is always 0 has no say: its weights cost nothing.
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    width = max(_BLOCK_COLUMNS // group, 1) * group
    for start in range(0, columns, width):
        end = min(start + width, columns)
        block, part = weight[:, start:end], upper[start:end, start:end]
        errors = torch.zeros_like(block)
        keep = torch.ones_like(block, dtype=torch.bool)
        for c in range(end - start):
            if c % group == 0:
                some = slice(c, c + group)
                losses = block[:, some] / part.diagonal()[some]
                keep[:, some] = nm_mask(losses, kept=pattern.kept, group=group)
            errors[:, c] = block[:, c].masked_fill(keep[:, c], 0) / part[c, c]
            block[:, c:] -= errors[:, c : c + 1] * part[c, c:]
        weight[:, end:] -= errors @ upper[start:end, end:]
        # Subtraction leaves rounding where there must be nothing.
        block.masked_fill_(~keep, 0)
