"""Wanda (arXiv 2306.11695): prune by |w| times the norm of the input that it meets.

    S[r, c] = |W[r, c]| * ||X[:, c]||_2

over all calibration tokens. The weights that survive keep their values.
"""

import torch

from cast_serve.kernels.pattern import nm_mask
from cast_serve.trainer.config import Pattern


def prune_wanda_(weight: torch.Tensor, norms: torch.Tensor, pattern: Pattern) -> None:
    """Prune weight [N, K], in place, for inputs of L2 norms [K]; groups lie in a row."""
    mask = nm_mask(weight * norms, kept=pattern.kept, group=pattern.group)
    weight.masked_fill_(~mask, 0)
