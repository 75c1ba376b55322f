"""cusparselt_plan: the plans that `cusparselt` multiplies with, one a number of rows of x.

A plan of the library holds for one M, N, K and element type. Serving sees every M, so plans are
built at load for the M of BUCKETS and an M between two runs in the upper one. All objects a plan
points to live as long as it does, and plans in use as long as the process; one takes 5 KB and less
than half a millisecond to build.
"""

import ctypes
import functools
from dataclasses import dataclass, field

import torch

from cast_serve.kernels.cusparselt_abi import (
    ALG_CONFIG_ID,
    ALG_DEFAULT,
    ELEMENTS,
    NON_TRANSPOSE,
    ORDER_COLUMN,
    ORDER_ROW,
    POINTER_ALIGNMENT,
    SPARSITY_50_PERCENT,
    TRANSPOSE,
    Opaque,
    load,
)

MAX_BUCKET = 16384
# Eight to an octave, multiples of 16: 16, 32, 48, 64, 80, ..., 128, 144, ..., 15360, 16384.
BUCKETS = tuple(
    rows
    for top in (1 << power for power in range(4, MAX_BUCKET.bit_length()))
    for rows in range(max(16, top // 16), top + 1, max(16, top // 16))
    if rows > top // 2
)

_ONE, _ZERO = ctypes.c_float(1.0), ctypes.c_float(0.0)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight's shape and type as the library knows it on one device."""

    device: torch.device
    dtype: torch.dtype
    N: int
    K: int
    handle: Opaque
    descriptor: Opaque


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan for exactly `rows` rows of x; `alive` is what it points to inside the library."""

    rows: int
    workspace_bytes: int
    handle: Opaque
    plan: Opaque
    alive: tuple[Opaque, ...]

    def launch(self, blob: int, x: int, y: int, *, add: bool, workspace: int, stream: int) -> None:
        """y = x @ W.T, or y += x @ W.T if `add`; arguments are addresses, x's rows adjacent."""
        library = load()
        alpha, beta = ctypes.byref(_ONE), ctypes.byref(_ONE if add else _ZERO)
        streams = ctypes.byref(ctypes.c_void_p(stream))
        status = library.matmul(
            self.handle, self.plan, alpha, blob, x, beta, y, y, workspace, streams, 1
        )
        if status:
            library.check(status, "cusparseLtMatmul")


@dataclass(frozen=True, kw_only=True)
class Plans:
    """The plans built so far for one weight shape, rows ascending."""

    weight: Weight
    built: list[Plan] = field(default_factory=list)

    def cover(self, rows: int) -> list[tuple[int, Plan]]:
        """(first row, plan) pairs that together run `rows` rows: one unless above the largest."""
        cover, start = [], 0
        while start < rows:
            plan = next((p for p in self.built if p.rows >= rows - start), self.built[-1])
            cover.append((start, plan))
            start += plan.rows
        return cover

    def missing(self, wanted: tuple[int, ...]) -> list[Plan]:
        """New plans for those of `wanted` that are not built; `add` keeps them."""
        have = {plan.rows for plan in self.built}
        return [build(self.weight, rows) for rows in wanted if rows not in have]

    def add(self, plans: list[Plan]) -> None:
        self.built.extend(plans)
        self.built.sort(key=lambda plan: plan.rows)


def buckets(M: int) -> tuple[int, ...]:
    """The buckets to build for M: those of its octave, 513 to 1024 for M = 700."""
    top = min(MAX_BUCKET, max(16, 1 << (M - 1).bit_length()))
    return tuple(rows for rows in BUCKETS if top // 2 < rows <= top)


@functools.cache
def plans_of(device: torch.device, dtype: torch.dtype, N: int, K: int) -> Plans:
    """The one set of plans of a key, empty at first."""
    return Plans(weight=weight_of(device, dtype, N, K))


@functools.cache
def weight_of(device: torch.device, dtype: torch.dtype, N: int, K: int) -> Weight:
    """The structured operand: W [N, K], row-major."""
    handle, descriptor, value = _handle(device), Opaque(), ELEMENTS[dtype].value
    load().call(
        "cusparseLtStructuredDescriptorInit",
        *(handle, descriptor, N, K, K, POINTER_ALIGNMENT, value, ORDER_ROW, SPARSITY_50_PERCENT),
    )
    return Weight(device=device, dtype=dtype, N=N, K=K, handle=handle, descriptor=descriptor)


def build(weight: Weight, rows: int) -> Plan:
    """The plan for x [rows, K]: D [N, rows], column-major, = W [N, K] times x transposed.

    D column-major is y [rows, N] row-major, so nothing is transposed in memory.

    Raises:
        CusparseltError: the library refuses the shape.
    """
    library, element, handle = load(), ELEMENTS[weight.dtype], weight.handle
    N, K = weight.N, weight.K
    x, y, matmul, selection, plan = (Opaque() for _ in range(5))
    library.call(
        "cusparseLtDenseDescriptorInit",
        *(handle, x, rows, K, K, POINTER_ALIGNMENT, element.value, ORDER_ROW),
    )
    library.call(
        "cusparseLtDenseDescriptorInit",
        *(handle, y, N, rows, N, POINTER_ALIGNMENT, element.result, ORDER_COLUMN),
    )
    library.call(
        "cusparseLtMatmulDescriptorInit",
        *(handle, matmul, NON_TRANSPOSE, TRANSPOSE, weight.descriptor, x, y, y, element.compute),
    )
    library.call("cusparseLtMatmulAlgSelectionInit", handle, selection, matmul, ALG_DEFAULT)
    # Named, not left to AlgSelectionInit, for which the documentation promises no id: another one
    # raised an illegal instruction, which ends the process's CUDA context (36 of 0.8.0 for fp16,
    # N=6144, K=4096, 512 rows on an H100). So none but 0 is ever tried.
    algorithm = ctypes.byref(ctypes.c_int(0))
    library.call("cusparseLtMatmulAlgSetAttribute", handle, selection, ALG_CONFIG_ID, algorithm, 4)
    library.call("cusparseLtMatmulPlanInit", handle, plan, matmul, selection)
    size = ctypes.c_size_t()
    library.call("cusparseLtMatmulGetWorkspace", handle, plan, ctypes.byref(size))
    return Plan(
        rows=rows,
        workspace_bytes=size.value,
        handle=handle,
        plan=plan,
        alive=(weight.descriptor, x, y, matmul, selection),
    )


def compressed_bytes(weight: Weight) -> tuple[int, int]:
    """Bytes of the blob, and of the scratch memory that compressing into it takes."""
    size, scratch = ctypes.c_size_t(), ctypes.c_size_t()
    load().call(
        "cusparseLtSpMMACompressedSize2",
        *(weight.handle, weight.descriptor, ctypes.byref(size), ctypes.byref(scratch)),
    )
    return size.value, scratch.value


def compress(weight: Weight, dense: torch.Tensor) -> torch.Tensor:
    """The library's blob, uint8, of a dense contiguous [N, K] weight that is 2:4."""
    size, scratch_bytes = compressed_bytes(weight)
    # Zeros, so that padding is the same every time.
    blob = torch.zeros(size, dtype=torch.uint8, device=dense.device)
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=dense.device)
    pointers = (dense.data_ptr(), blob.data_ptr(), scratch.data_ptr())
    load().call(
        "cusparseLtSpMMACompress2",
        *(weight.handle, weight.descriptor, 1, NON_TRANSPOSE, *pointers, stream(dense.device)),
    )
    return blob


def stream(device: torch.device) -> int:
    """torch's current stream on `device`, as CUDA's handle."""
    return torch.cuda.current_stream(device).cuda_stream


@functools.cache
def _handle(device: torch.device) -> Opaque:
    # cusparseLtInit binds to the thread's current CUDA context; an allocation makes sure of one.
    torch.empty(1, device=device)
    handle = Opaque()
    load().call("cusparseLtInit", handle)
    return handle
