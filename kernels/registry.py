"""The kernels there are, in the order in which errors and tables name them.

A kernel is one module with a `SPEC` and the `metadata_layout(mask)` that its SPEC names. To add
one: its module, its two lines here, its test, and rows in the tables where it wins.
"""

from collections.abc import Callable

import torch

from cast_serve.kernels import cusparselt, mma_sp, wgmma_sp
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.reference import spmm_ref
from cast_serve.kernels.spec import KernelSpec

# metadata = layout(mask uint8 [N, K/8])
Layout = Callable[[torch.Tensor], torch.Tensor]


def _supports_all(problem: Problem) -> str | None:
    return None


def _fp32(problem: Problem, M: int) -> tuple[str, ...]:
    return ("fp32",)


def _nothing_to_prepare(problem: Problem, config: str, M: int) -> None:
    return None


def _run_reference(
    x: torch.Tensor,
    values: torch.Tensor,
    metadata: torch.Tensor,
    bias: torch.Tensor | None,
    config: str,
) -> torch.Tensor:
    return spmm_ref(x, values, metadata, bias)


def _mask_itself(mask: torch.Tensor) -> torch.Tensor:
    return mask


# Unpacks the weight at every call: for CPUs and for doubts, never chosen by time.
REFERENCE = KernelSpec(
    name="reference",
    metadata="mask",
    supports=_supports_all,
    configs=_fp32,
    prepare=_nothing_to_prepare,
    run=_run_reference,
)

# Those that selection chooses between.
KERNELS: dict[str, KernelSpec] = {
    spec.name: spec for spec in (mma_sp.SPEC, wgmma_sp.SPEC, cusparselt.SPEC)
}

# Those that can be named: in a plan, and in CAST_SERVE_KERNEL.
NAMED: dict[str, KernelSpec] = {**KERNELS, REFERENCE.name: REFERENCE}

# In the order of a weight's metadata tensors.
LAYOUT_NAMES: tuple[str, ...] = tuple(dict.fromkeys(spec.metadata for spec in NAMED.values()))

# Without that of cuSPARSELt, which is no function of the mask: `weight.build` makes it.
LAYOUTS: dict[str, Layout] = {
    mma_sp.SPEC.metadata: mma_sp.metadata_layout,
    wgmma_sp.SPEC.metadata: wgmma_sp.metadata_layout,
    REFERENCE.metadata: _mask_itself,
}
