"""cusparselt: y = x @ W.T with 2:4-packed W, by NVIDIA's cuSPARSELt, for prefill.

Shapes   x_MK bf16 or fp16, values_NH (H = K/2), metadata uint8 blob, bias_N -> y_MN; fp32 sums.
Needs    sm_80, 86, 89 or 90; N and K multiples of 16; cuSPARSELt 0.7.1 or later.
Layout   The library reads one blob: values, row-major [N, K/2], then metadata in an order of its
         own (N*K/8 bytes if N and K are multiples of 128, padded otherwise). So `metadata` is the
         whole blob and `values` a view on its start, shared with the other kernels. That form is
         not documented: `check_layout` refuses a library without it, and `fill_metadata` verifies
         every weight.
Plans    Built at load for certain M (cusparselt_plan.BUCKETS). Another M runs in the next one,
         which costs a copy of x and at most 1/8 more arithmetic above M = 128, 15 rows below.
         x is also copied where its rows are not adjacent (a plan fixes the row pitch), and cut
         into chunks of the largest bucket prepared where it is longer.
Infinity Where a sum is -inf, y is NaN (0.8.0 on H100); +inf and NaN come through as they are.
Bias     y is filled with it and the product added (beta = 1): one rounding, as if fused. The
         library's bias pointer is part of a plan, so it would take plans a layer, not a shape.
         Costs a write and a read of y; the linears of Llama and Qwen3 have none.
Host     One ctypes call and two allocations; nothing is created, searched or awaited in `run`.
"""

import functools
import logging

import torch

from cast_serve.kernels.cusparselt_abi import (
    ELEMENTS,
    POINTER_ALIGNMENT,
    CusparseltError,
    LibraryNotFoundError,
    load,
)
from cast_serve.kernels.cusparselt_plan import (
    BUCKETS,
    Plan,
    Weight,
    buckets,
    build,
    compress,
    compressed_bytes,
    plans_of,
    stream,
    weight_of,
)
from cast_serve.kernels.packing import unpack
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.spec import KernelSpec

logger = logging.getLogger(__name__)

# The blob's layout was seen on sm_90; sm_80, 86 and 89 rely on `check_layout`. Blackwell (sm_100,
# 120) is refused: the library has other kernels there, and nothing here has run on it.
SUPPORTED_SM = (80, 86, 89, 90)

CONFIG = "default"

# The release notes of 0.8.1 tell of a slower 0.8.0 on H100 and L4, mended.
SLOW_VERSION, SLOW_SM = (0, 8, 0), (89, 90)


class LayoutError(RuntimeError):
    """The library's blob does not start with row-major values, so they cannot be shared."""


def supports(problem: Problem) -> str | None:
    """None if the problem runs at any M, else why not; loads the library and tries it once."""
    element = ELEMENTS.get(problem.dtype)
    if element is None:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in ELEMENTS)
        return f"{str(problem.dtype).removeprefix('torch.')} is not one of {known}"
    if problem.sm not in SUPPORTED_SM:
        supported = ", ".join(f"sm_{sm}" for sm in SUPPORTED_SM)
        return f"sm_{problem.sm} is not one of {supported}"
    for name, size in (("N", problem.N), ("K", problem.K)):
        if size < element.multiple or size % element.multiple:
            return f"{name}={size} is not a multiple of {element.multiple}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        _try_sizes(_device(), problem.dtype, problem.N, problem.K)
        return check_layout(problem)
    except (LibraryNotFoundError, CusparseltError) as error:
        return str(error)


def check_layout(problem: Problem) -> str | None:
    """None if the library's blob starts with row-major values, else what it is and what to do.

    Compresses a weight of at most 255 x 255 that is padded as the problem's is.
    """
    N, K = (size if size < 256 else 128 + size % 128 for size in (problem.N, problem.K))
    return _layout_fault(_device(), problem.dtype, N, K)


def blob_bytes(problem: Problem) -> int:
    """Size of the blob, values and metadata, on the current device."""
    return compressed_bytes(weight_of(_device(), problem.dtype, problem.N, problem.K))[0]


def fill_metadata(blob: torch.Tensor, mask: torch.Tensor, problem: Problem) -> None:
    """Write the metadata of `mask` behind the values of a blob, whose values it leaves alone.

    The library derives metadata from the non-zeros of a dense weight. Here it gets a stand-in with
    a non-zero at every kept position, so groups with fewer than two non-zeros keep exactly the
    mask's columns. Takes about 6 bytes a weight entry of temporary memory, and synchronises.

    Args:
        blob: uint8 [blob_bytes(problem)], contiguous, 16-byte aligned, on the current device.
        mask: uint8 [N, K/8] on the same device, as `pack` gives it.

    Raises:
        LayoutError: the stand-in's values did not come back row-major.
    """
    weight = weight_of(blob.device, problem.dtype, problem.N, problem.K)
    standin = _standin(problem.N, problem.K, problem.dtype, blob.device)
    compressed = compress(weight, unpack(standin, mask))
    assert blob.shape == compressed.shape, f"blob {list(blob.shape)}, not {list(compressed.shape)}"
    if not _starts_with(compressed, standin):
        raise LayoutError(_layout_message(weight))
    blob[standin.nbytes :] = compressed[standin.nbytes :]


def configs(problem: Problem, M: int) -> tuple[str, ...]:
    """The library's default algorithm alone; `build` says why no other."""
    return (CONFIG,)


def prepare(problem: Problem, config: str, M: int) -> None:
    """Build the plans of `buckets(M)` and launch each once; plans built before are kept.

    Raises:
        CusparseltError: the library refuses the shape.
        ValueError: `config` is not CONFIG.
    """
    if config != CONFIG:
        raise ValueError(f"cusparselt has no config {config!r}: there is {CONFIG!r} alone")
    plans = plans_of(_device(), problem.dtype, problem.N, problem.K)
    missing = plans.missing(buckets(M))
    if not missing:
        return
    _warn_if_slow(load().version, problem.sm)
    # A kernel's code is loaded at its first launch, which must not fall into serving or a capture.
    blob, x, y = _scratch(plans.weight, max(plan.rows for plan in missing))
    for plan in missing:
        _launch(plan, x[: plan.rows], blob.data_ptr(), y.data_ptr(), False)
    torch.cuda.synchronize(plans.weight.device)
    plans.add(missing)


def run(
    x: torch.Tensor,
    values: torch.Tensor,
    metadata: torch.Tensor,
    bias: torch.Tensor | None,
    config: str,
) -> torch.Tensor:
    """y [M, N] = x [M, K] @ W.T + bias on the current device and stream, as KernelSpec.run says.

    `metadata` is the blob of which `values` is the start; `values` itself is not read. Rows
    of a bucket beyond M are computed from uninitialised memory and cut off: a row of y depends on
    its own row of x alone, so what they hold, NaN or not, harms nothing.
    """
    rows, K = x.shape
    N = values.shape[0]
    plans = plans_of(x.device, x.dtype, N, K)
    assert plans.built, f"cusparselt was not prepared for N={N} K={K} {x.dtype}"
    cover = plans.cover(rows)
    last_start, last = cover[-1]
    y = x.new_empty(last_start + last.rows, N)
    if bias is not None:
        y.copy_(bias)
    for start, plan in cover:
        part = x if len(cover) == 1 else x[start : start + plan.rows]
        address = y.data_ptr() + start * N * y.itemsize
        _launch(plan, part, metadata.data_ptr(), address, bias is not None)
    return y if y.shape[0] == rows else y[:rows]


def _launch(plan: Plan, x: torch.Tensor, blob: int, y: int, add: bool) -> None:
    rows, K = x.shape
    if rows != plan.rows or x.stride(0) != K or x.data_ptr() % POINTER_ALIGNMENT:
        padded = x.new_empty(plan.rows, K)
        padded[:rows] = x
        x = padded
    # From torch's allocator at each call, not kept with the plan: two streams may run one plan.
    workspace = x.new_empty(plan.workspace_bytes, dtype=torch.uint8)
    on = stream(x.device)
    plan.launch(blob, x.data_ptr(), y, add=add, workspace=workspace.data_ptr(), stream=on)


@functools.cache
def _warn_if_slow(version: tuple[int, int, int], sm: int) -> None:
    if version == SLOW_VERSION and sm in SLOW_SM:
        cuda = (torch.version.cuda or "13").partition(".")[0]
        logger.warning(
            "cuSPARSELt 0.8.0 is slower than it should be on sm_%d (a regression on H100 and L4, "
            "mended in 0.8.1): pip install --no-deps nvidia-cusparselt-cu%s==0.8.1",
            sm,
            cuda,
        )


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _scratch(weight: Weight, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(blob, x [rows, K], y [rows, N]) to launch plans on: x is zero, the blob a real weight's."""
    x = torch.zeros(rows, weight.K, dtype=weight.dtype, device=weight.device)
    standin = _standin(weight.N, weight.K, weight.dtype, weight.device)
    # Made by the library: metadata that no mask has is an illegal instruction.
    blob = compress(weight, unpack(standin, _mask_of_all_pairs(weight)))
    return blob, x, x.new_empty(rows, weight.N)


def _mask_of_all_pairs(weight: Weight) -> torch.Tensor:
    """Bitmask uint8 [N, K/8] whose groups keep each pair of columns in turn."""
    pairs = torch.tensor([0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100], device=weight.device)
    groups = torch.arange(weight.N * weight.K // 4, device=weight.device)
    nibbles = pairs[groups % len(pairs)].reshape(weight.N, -1, 2)
    return (nibbles[..., 0] | nibbles[..., 1] << 4).to(torch.uint8)


def _standin(N: int, K: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Values [N, K/2] that differ from their neighbours along rows and columns, none zero.

    1 to 251: whole numbers up to 256 are exact in bfloat16, and a prime period fits no tile.
    """
    rows = torch.arange(N, device=device) * 7 % 251
    columns = torch.arange(K // 2, device=device) % 251
    return ((rows.short()[:, None] + columns.short()).remainder_(251) + 1).to(dtype)


def _starts_with(blob: torch.Tensor, values: torch.Tensor) -> bool:
    return torch.equal(blob[: values.nbytes].view(values.dtype), values.flatten())


@functools.cache
def _try_sizes(device: torch.device, dtype: torch.dtype, N: int, K: int) -> None:
    """Raise CusparseltError if the library refuses the shape; only it knows the upper limits."""
    for rows in (BUCKETS[0], BUCKETS[-1]):
        build(weight_of(device, dtype, N, K), rows)


@functools.cache
def _layout_fault(device: torch.device, dtype: torch.dtype, N: int, K: int) -> str | None:
    weight = weight_of(device, dtype, N, K)
    standin = _standin(N, K, dtype, device)
    blob = compress(weight, unpack(standin, _mask_of_all_pairs(weight)))
    return None if _starts_with(blob, standin) else _layout_message(weight)


def _layout_message(weight: Weight) -> str:
    version = ".".join(map(str, load().version))
    return (
        f"cuSPARSELt {version} on {torch.cuda.get_device_name(weight.device)} does not store a "
        f"[{weight.N}, {weight.K}] weight's values first and row-major, so they cannot be shared; "
        "use another version of it, or another kernel (CAST_SERVE_KERNEL)"
    )


SPEC = KernelSpec(
    name="cusparselt",
    metadata="cusparselt",
    supports=supports,
    configs=configs,
    prepare=prepare,
    run=run,
)
