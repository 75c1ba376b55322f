"""cast_serve::linear_2of4: y = x @ W.T + bias with a 2:4-packed W, by the fastest kernel at each M.

  Shapes   x_[...]K, values_NH (H = K/2), metadata as in `SparseWeight`, bias_N -> y_[...]N
  Dtypes   all but the metadata alike; fp32 accumulation, one rounding
  Device   CUDA: the kernels of `plan_for`. Elsewhere the fp32 reference, with metadata [bitmask].

Opaque to torch.compile, whose M may be symbolic: the choice by M is made inside. Capturable in a
CUDA graph once `warm` has run for the layer. No gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from cast_serve.kernels.plan import Plan, Row
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.registry import NAMED, REFERENCE
from cast_serve.kernels.selection import plan_for, warm
from cast_serve.kernels.spec import Run

# TMA and 16-byte loads: a row of x starts at a multiple of this.
_ALIGNMENT = 16

REFERENCE_PLAN = Plan(rows=(Row(max_M=None, kernel=REFERENCE.name, config="fp32"),))


@dataclass(frozen=True, slots=True)
class Route:
    """A plan's row with its names looked up; `index` is that of the row's metadata."""

    max_M: float
    run: Run
    config: str
    index: int


def _run(x: Tensor, values: Tensor, metadata: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """cast_serve::linear_2of4.

    Rows of x that are not contiguous, or do not start at multiples of 16 bytes, are copied first:
    the only copy.

    Args:
        x: [..., K].
        values: [N, K/2], from `SparseWeight`.
        metadata: from the same `SparseWeight`.
        bias: [N].

    Returns:
        [..., N] in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices do not belong together, or selection refuses.
    """
    _check(x, values, metadata, bias)
    N, H = values.shape
    table, layouts = routes(values.device, N, H, values.dtype)
    if len(metadata) != layouts:
        raise ValueError(
            f"{len(metadata)} metadata tensors for W [{N}, {2 * H}], whose plan needs {layouts}: "
            "pass those of the SparseWeight built with plan_for(...).layouts"
        )
    leading = x.shape[:-1]
    rows = x.reshape(-1, 2 * H)
    M = rows.shape[0]
    if M == 0:
        return x.new_empty(*leading, N)
    rows = as_rows_of_16_bytes(rows)
    for route in table:
        if route.max_M >= M:
            break
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            y = route.run(rows, values, metadata[route.index], bias, route.config)
    else:
        y = route.run(rows, values, metadata[route.index], bias, route.config)
    return y if x.dim() == 2 else y.view(*leading, N)


def _shape(x: Tensor, values: Tensor, metadata: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """What torch.compile sees of it."""
    _check(x, values, metadata, bias)
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _check(x: Tensor, values: Tensor, metadata: Sequence[Tensor], bias: Tensor | None) -> None:
    if values.dim() != 2 or x.dim() == 0 or x.shape[-1] != 2 * values.shape[1]:
        raise ValueError(
            f"x {list(x.shape)} does not fit values {list(values.shape)}: "
            "needs [..., K] and [N, K/2]"
        )
    if x.dtype != values.dtype or x.device != values.device:
        raise ValueError(
            f"x is {x.dtype} on {x.device}, values are {values.dtype} on {values.device}"
        )
    for tensor in metadata:
        if tensor.device != values.device:
            raise ValueError(f"metadata is on {tensor.device}, values are on {values.device}")
    if bias is None:
        return
    if bias.dim() != 1 or bias.shape[0] != values.shape[0]:
        raise ValueError(
            f"bias {list(bias.shape)} does not fit values {list(values.shape)}: needs [N]"
        )
    if bias.dtype != values.dtype or bias.device != values.device:
        raise ValueError(
            f"bias is {bias.dtype} on {bias.device}, values are {values.dtype} on {values.device}"
        )


def as_rows_of_16_bytes(x: Tensor) -> Tensor:
    """x [M, K], or a copy of it, as `KernelSpec.run` wants it."""
    M, K = x.shape
    row, column = x.stride()
    if column != 1 or x.data_ptr() % _ALIGNMENT:
        return x.clone(memory_format=torch.contiguous_format)
    if M == 1 and row != K:
        # The stride of a single row means nothing; kernels still hand it to the hardware.
        return x.as_strided((1, K), (K, 1))
    # row < K: rows that overlap, as `expand` makes them.
    if row < K or row * x.element_size() % _ALIGNMENT:
        return x.clone(memory_format=torch.contiguous_format)
    return x


@cache
def routes(
    device: torch.device, N: int, H: int, dtype: torch.dtype
) -> tuple[tuple[Route, ...], int]:
    """The plan of a layer with its names looked up, and how many layouts it has."""
    plan = REFERENCE_PLAN
    if device.type == "cuda":
        problem = Problem.on(device, N=N, K=2 * H, dtype=dtype)
        warm(problem, device)
        plan = plan_for(problem)
    routes = (
        Route(
            max_M=float("inf") if row.max_M is None else row.max_M,
            run=NAMED[row.kernel].run,
            config=row.config,
            index=plan.layouts.index(NAMED[row.kernel].metadata),
        )
        for row in plan.rows
    )
    return tuple(routes), len(plan.layouts)


# Not torch.library.custom_op: its wrapper takes 14 us of host time a call, two thirds of a whole
# torch.nn.functional.linear, which a prefill outside of CUDA graphs pays at every layer.
_LIBRARY = torch.library.Library("cast_serve", "FRAGMENT")
_LIBRARY.define(
    "linear_2of4(Tensor x, Tensor values, Tensor[] metadata, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("linear_2of4", _run, "CompositeExplicitAutograd")
torch.library.register_fake("cast_serve::linear_2of4", _shape, lib=_LIBRARY)

linear_2of4 = torch.ops.cast_serve.linear_2of4.default
