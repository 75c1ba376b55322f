"""Random 2:4 layers, and problems of a GPU that this machine need not have."""

import torch

from cast_serve.kernels.pattern import random_mask
from cast_serve.kernels.problem import Problem

# A GPU for which no table ships.
GPU = "NVIDIA Grasshopper 1"


def problem(
    N: int = 512,
    K: int = 1024,
    *,
    dtype: torch.dtype = torch.bfloat16,
    capability: tuple[int, int] = (9, 0),
    gpu: str = GPU,
) -> Problem:
    return Problem(N=N, K=K, dtype=dtype, capability=capability, gpu=gpu)


def random_packed(
    N: int, K: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [N, K/2] and mask uint8 [N, K/8], the same every time."""
    generator = torch.Generator(device).manual_seed(N * K)
    values = torch.randn(N, K // 2, generator=generator, device=device).to(dtype)
    return values, random_mask(N, K, generator)
