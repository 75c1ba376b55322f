"""KernelSpec: what selection knows of a kernel, and how the op calls it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cast_serve.kernels.problem import Problem

# run(x [M, K], values [N, K/2], metadata, bias [N] or None, config) -> y [M, N]
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, str], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One kernel.

    A config is a name, such as "r128-t64-k2", that the kernel's own module turns into tile sizes;
    tables and caches hold names only.

    Attributes:
        name: as in tables, `CAST_SERVE_KERNEL` and results.
        metadata: the metadata layout it reads, one of `registry.LAYOUT_NAMES`. Kernels that name
            the same layout share one copy.
        supports: None if it can run the problem at any M, else the reason in one clause, such as
            "K=100 is not a multiple of 64".
        configs: the config names worth timing for (problem, M), best guess first; never empty for
            a supported problem and M >= 1.
        prepare: compiles and creates whatever `run` needs for (problem, config, M) on the current
            device, and for every M of the same bucket; slow and called at load only. After it,
            `run` compiles nothing, searches nothing and never synchronises.
        run: y = x @ W.T + bias for x [M, K], M >= 1, rows contiguous (stride(1) == 1, stride(0)
            any multiple of 16 bytes), on the current stream; capturable in a CUDA graph.
    """

    name: str
    metadata: str
    supports: Callable[[Problem], str | None]
    configs: Callable[[Problem, int], tuple[str, ...]]
    prepare: Callable[[Problem, str, int], None]
    run: Run
