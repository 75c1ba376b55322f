"""What a kernel is asked: one 2:4 linear layer on one GPU, y[M, N] = x[M, K] @ W[N, K].T."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A layer's shape and element type, and the GPU it runs on, at any number of tokens M.

    `dtype` is that of the kept values and of x: bfloat16 or float16 today; FP8 and INT8 are further
    values of it, not further classes. `capability` is CUDA's compute capability, (9, 0) for Hopper.
    """

    N: int
    K: int
    dtype: torch.dtype
    capability: tuple[int, int]
    gpu: str

    @classmethod
    def on(cls, device: torch.device, *, N: int, K: int, dtype: torch.dtype) -> "Problem":
        """The layer [N, K] on the CUDA device `device`."""
        return cls(
            N=N,
            K=K,
            dtype=dtype,
            capability=torch.cuda.get_device_capability(device),
            gpu=torch.cuda.get_device_name(device),
        )

    @property
    def sm(self) -> int:
        """Compute capability as NVIDIA writes it after `sm_`: 90 for (9, 0)."""
        return self.capability[0] * 10 + self.capability[1]

    @property
    def dtype_name(self) -> str:
        """As in tables and file names: "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"N={self.N} K={self.K} {self.dtype_name} on {self.gpu} (sm_{self.sm})"
