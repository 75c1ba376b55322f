"""wgmma_sp: y = x @ W.T with 2:4-packed W on Hopper, for decode and prefill.

Shapes   x_MK, values_NH (H = K/2), metadata int32 [ceil(N/64), ceil(K/128)*2, 128] -> y_MN
Dtypes   bfloat16 or float16; fp32 accumulation, bias added before the one rounding
Needs    sm_90 (its instructions, wgmma.mma_async.sp and TMA, are Hopper's own), N and K
         multiples of 16
Source   wgmma_sp.cu, compiled by NVRTC for each config (wgmma_sp_source.py)
Wins     at every M on H100 and H200 (kernels/README.md)
"""

import ctypes
import functools
from importlib.util import find_spec

import torch

from cast_serve.kernels.metadata import PADDING_CODE, group_codes
from cast_serve.kernels.nvrtc import Function, cached_cubin, tensor_map
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.spec import KernelSpec
from cast_serve.kernels.user_cache import user_cache
from cast_serve.kernels.wgmma_sp_source import ELEMENTS, Config, source

TensorMap = ctypes.Array[ctypes.c_char]

# By M, up to and including: what won on a layer of Llama-3.1-8B, or came near, and below the gap
# what small layers need to fill the GPU. "{t}" stands for the smallest token tile that holds M.
_DECODE = """
    g1x1-t{t}-w512-k1-o1 g1x1-t{t}-w256-k2-o2 g1x2-t{t}-w256-k1-o1 g1x1-t{t}-w512-k2-o2
    g1x1-t{t}-w512-k1-o2 g1x1-t{t}-w1024-k1-o1 g1x2-t{t}-w256-k4-o2 g2x1-t{t}-w512-k1-o1
    g1x1-t{t}-w256-k1-o1 g1x2-t{t}-w256-k2-o1 g1x1-t{t}-w512-k2-o1 g1x1-t{t}-w256-k1-o3
    g2x1-t{t}-w256-k1-o1 g1x1-t{t}-w256-k1-o2 g1x1-t{t}-w512-k1-o3 g1x2-t{t}-w256-k7-o3

    g1x1-t{t}-w512-k4-o2 g1x1-t{t}-w512-k3-o2 g1x1-t{t}-w256-k4-o3 g1x1-t{t}-w256-k8-o2
"""
_UP_TO_64 = """
    g1x1-t64-w256-k1-o1 g1x2-t64-w256-k1-o2 g1x1-t64-w512-k1-o1 g1x1-t64-w256-k2-o1
    g1x1-t32-w512-k1-o1 g2x1-t64-w256-k2-o1 g2x1-t64-w256-k1-o2 g1x2-t64-w256-k1-o1
    g3x1-t64-w256-k1c2-o1 g1x1-t32-w256-k1-o1 g2x1-t64-w256-k1-o1 g1x1-t64-w512-k2-o1
    g2x1-t64-w256-k3-o1 g3x1-t64-w256-k4-o1 g1x2-t32-w512-k1-o1 g1x1-t64-w256-k1-o2

    g1x1-t64-w512-k4-o1 g1x1-t64-w256-k4-o1 g1x1-t32-w256-k1-o2 g1x1-t32-w256-k4-o2
    g1x1-t16-w256-k1-o2 g1x1-t16-w512-k1-o1 g1x1-t32-w256-k8-o2
"""
_UP_TO_128 = """
    g1x2-t64-w256-k1-o1 g2x1-t128-w256-k1-o1 g1x1-t64-w512-k1-o1 g1x1-t128-w256-k1-o1
    g2x1-t128-w256-k3-o1 g3x1-t128-w128-k1-o1 g2x2-t128-w128-k1-o1 g3x1-t128-w128-k3-o1
    g1x2-t128-w128-k3-o1 g2x1-t64-w256-k1-o1 g1x1-t64-w256-k1-o1 g1x1-t128-w256-k2-o1
    g2x2-t128-w128-k4-o1 g2x1-t128-w128-k1-o1 g1x2-t128-w256-k2-o1

    g1x1-t128-w256-k4-o1 g1x2-t64-w256-k4-o1 g1x1-t64-w256-k1-o2 g1x1-t64-w256-k4-o2
    g1x1-t32-w512-k1-o1 g1x1-t32-w256-k1-o2 g1x1-t32-w256-k4-o2 g1x1-t16-w256-k1-o2
"""
_UP_TO_512 = """
    g2x1-t128-w256-k1-o1 g1x2-t64-w256-k1-o1 g2x1-t256-w128-k1-o1 g3x1-t128-w128-k1-o1
    g1x2-t128-w256-k1-o1 g3x1-t64-w256-k1-o1 g3x1-t128-w128-k2-o1 g1x2-t128-w256-k2-o1
    g2x2-t128-w128-k1-o1 g1x2-t128-w128-k1-o2 g2x1-t256-w128-k2-o1 g2x1-t128-w256-k2-o1
    g2x1-t64-w256-k1-o1 g1x1-t128-w256-k1-o1 g2x1-t256-w128-k3-o1 g2x1-t256-w128-k1c2-o1

    g1x2-t128-w256-k4-o1 g1x1-t64-w256-k1-o1 g1x1-t64-w256-k1-o2 g1x1-t64-w512-k1-o1
    g1x1-t128-w128-k1-o2 g1x1-t32-w256-k1-o2 g1x1-t128-w256-k3-o1 g2x1-t128-w256-k3-o1
    g1x2-t128-w256-k3-o1 g2x1-t256-w128-k6-o1 g2x1-t64-w128-k1-o2 g1x1-t64-w128-k1-o3
    g2x1-t128-w256-k3c2-o1 g2x2-t128-w128-k6-o1
"""
_UP_TO_1024 = """
    g2x2-t128-w256-k1-o1 g2x1-t256-w128-k1-o1 g3x1-t128-w128-k1-o1 g1x2-t128-w256-k1-o1
    g2x1-t128-w256-k1-o1 g2x2-t128-w128-k1-o1 g2x2-t192-w128-k1-o1 g2x1-t256-w128-k1c2-o1
    g1x1-t128-w256-k1-o1 g1x2-t128-w128-k1-o2

    g2x1-t128-w256-k2-o1 g1x1-t64-w256-k1-o2 g1x1-t128-w128-k1-o2 g1x1-t64-w512-k1-o1
    g2x1-t64-w128-k1-o1 g2x1-t64-w128-k1-o2 g1x1-t64-w128-k1-o3 g1x1-t128-w128-k2-o2
"""
_PREFILL = """
    g2x2-t192-w128-k1c2-o1 g2x2-t128-w256-k1-o1 g2x1-t256-w128-k1c2-o1 g2x2-t192-w128-k1-o1
    g2x1-t256-w128-k1-o1 g2x2-t176-w128-k1c2-o1 g2x2-t176-w128-k1-o1 g2x2-t128-w256-k1c2-o1
    g2x1-t128-w256-k1-o1

    g3x1-t128-w128-k1-o1 g1x1-t128-w128-k1-o2 g1x1-t128-w128-k1-o3 g3x1-t64-w128-k1-o2
    g1x2-t128-w256-k1-o1 g1x2-t128-w128-k1-o2
"""
_CONFIGS = {
    32: _DECODE.split(),
    64: _UP_TO_64.split(),
    128: _UP_TO_128.split(),
    512: _UP_TO_512.split(),
    1024: _UP_TO_1024.split(),
    float("inf"): _PREFILL.split(),
}

# Of an H100's or H200's multiprocessors: with fewer at work, memory is not.
_ENOUGH_CTAS = 60


def supports(problem: Problem) -> str | None:
    if problem.capability != (9, 0):
        return f"needs Hopper (sm_90), this GPU is sm_{problem.sm}"
    if problem.dtype not in ELEMENTS:
        return f"{str(problem.dtype).removeprefix('torch.')} is neither bfloat16 nor float16"
    if problem.N % 16:
        return f"N={problem.N} is not a multiple of 16"
    if problem.K % 16:
        return f"K={problem.K} is not a multiple of 16"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "cuda-bindings is not installed: pip install cuda-bindings"
    return None


def configs(problem: Problem, M: int) -> tuple[str, ...]:
    """By M; those that leave most of the GPU idle come last, and none splits K into nothing."""
    tokens = next((t for t in (8, 16, 32) if t >= M), 32)
    names = next(names for limit, names in _CONFIGS.items() if limit >= M)
    names = [name.format(t=tokens) for name in names]
    element = ELEMENTS[problem.dtype]

    def fits(name: str) -> bool:
        config = _parse(name)
        return config.split <= -(-problem.K * element.bytes // config.width)

    def idle(name: str) -> int:
        config = _parse(name)
        ctas = -(-problem.N // config.rows) * -(-M // config.tokens) * config.split
        return max(0, _ENOUGH_CTAS - ctas)

    return tuple(sorted(filter(fits, names), key=idle))


def metadata_layout(mask: torch.Tensor, *, element_bytes: int = 2) -> torch.Tensor:
    """int32 [ceil(N/64), ceil(K/128)*2, 128] of a bitmask uint8 [N, K/8].

    Word 32w + 4g + t of [b, s] has eight codes of columns 64s to 64s + 63 and rows near
    r = 64b + 16w + g (PTX ISA, "Sparse matrix storage" of wgmma). For values of 2 bytes: columns
    64s + 16t .. +15 of row r in its low half, and of row r + 8 in its high half; t < 2 is what
    selector 0 reads. Of 1 byte: columns 64s + 32(t // 2) .. +31 of row r + 8(t % 2). Padding keeps
    columns 0 and 1.
    """
    rows, columns = mask.shape[0], mask.shape[1] * 8
    blocks, steps = -(-rows // 64), -(-columns // 128) * 2
    codes = mask.new_full((blocks * 64, steps * 16), PADDING_CODE)
    codes[:rows, : columns // 4] = group_codes(mask)
    # block, warp, half, g, step, quarter of its 64 columns, code
    codes = codes.view(blocks, 4, 2, 8, steps, 4, 4)
    pairs = codes[..., 0::2] | codes[..., 1::2] << 4
    if element_bytes == 2:
        # A word's bytes, lowest first: two of the low half, two of the high half.
        words = pairs.permute(0, 4, 1, 3, 5, 2, 6)
    else:
        words = pairs.unflatten(5, (2, 2)).permute(0, 4, 1, 3, 5, 2, 6, 7)
    return words.reshape(blocks, steps, 128, 4).view(torch.int32).squeeze(-1)


def prepare(problem: Problem, config: str, M: int) -> None:
    """Compile, or take from the user's cache, and load."""
    device = torch.cuda.current_device()
    _function(config, problem.dtype, device)
    _multiprocessors(device)


def run(
    x: torch.Tensor,
    values: torch.Tensor,
    metadata: torch.Tensor,
    bias: torch.Tensor | None,
    config: str,
) -> torch.Tensor:
    M, K = x.shape
    N = values.shape[0]
    device = x.get_device()
    tile = _parse(config)
    y = x.new_empty(M, N)
    values_map, metadata_map = _weight_maps(
        values.data_ptr(), metadata.data_ptr(), N, K, values.dtype, config
    )
    row_bytes = x.stride(0) * x.element_size()
    x_map = _x_map(x.data_ptr(), M, K, row_bytes, x.dtype, tile.tokens // tile.share)
    _function(config, x.dtype, device).launch(
        _blocks(config, M, N, device),
        [
            values_map,
            metadata_map,
            x_map,
            ctypes.c_void_p(None if bias is None else bias.data_ptr()),
            ctypes.c_void_p(y.data_ptr()),
            ctypes.c_int(M),
            ctypes.c_int(N),
            ctypes.c_int(K),
        ],
        torch._C._cuda_getCurrentRawStream(device),  # as Inductor's code; 3 us less of host time
    )
    return y


_parse = functools.cache(Config.parse)


@functools.cache
def _function(config: str, dtype: torch.dtype, device: int) -> Function:
    tile = _parse(config)
    with torch.cuda.device(device):
        return Function(
            cached_cubin(source(tile, ELEMENTS[dtype], dtype), user_cache() / "cubin"),
            "wgmma_sp",
            shared_bytes=tile.shared_bytes,
            threads=tile.threads,
            # Weights are on their way while the kernel ahead ends: 1.5 % at M = 1 on H100.
            overlaps=True,
        )


@functools.lru_cache(maxsize=1 << 14)
def _blocks(config: str, M: int, N: int, device: int) -> int:
    return _parse(config).blocks(M, N, _multiprocessors(device))


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# A model has at most a few hundred layers, each with a handful of configs.
@functools.lru_cache(maxsize=1 << 14)
def _weight_maps(
    values: int, metadata: int, N: int, K: int, dtype: torch.dtype, config: str
) -> tuple[TensorMap, TensorMap]:
    tile, element = _parse(config), ELEMENTS[dtype]
    row_bytes = 64 if tile.width == 128 else 128
    words = tile.width // 64 // element.steps_a_word
    blocks, steps = -(-N // 64), -(-K // 128) * 2
    values_map = tensor_map(
        values,
        dtype,
        shape=(K // 2, N),
        strides=(K // 2 * element.bytes,),
        box=(row_bytes // element.bytes, tile.rows),
        swizzle=row_bytes,
    )
    metadata_map = tensor_map(
        metadata,
        torch.int32,
        shape=(128, steps, blocks),
        strides=(512, 512 * steps),
        box=(128, words, tile.rows // 64),
        swizzle=0,
    )
    return values_map, metadata_map


# Serving reuses the addresses of PyTorch's caching allocator, so most calls find their map here.
@functools.lru_cache(maxsize=1 << 12)
def _x_map(x: int, M: int, K: int, row_bytes: int, dtype: torch.dtype, tokens: int) -> TensorMap:
    return tensor_map(
        x,
        dtype,
        shape=(K, M),
        strides=(row_bytes,),
        box=(128 // dtype.itemsize, tokens),
        swizzle=128,
    )


SPEC = KernelSpec(
    name="wgmma_sp",
    metadata="wgmma_sp",
    supports=supports,
    configs=configs,
    prepare=prepare,
    run=run,
)
