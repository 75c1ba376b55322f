"""CUDA C++ at run time: source -> cubin through NVRTC, cached on disk -> a function on the GPU.

NVRTC and the driver bindings come with PyTorch's CUDA wheels (`nvidia-cuda-nvrtc`,
`cuda-bindings`), so users need no CUDA toolkit. Both are imported when a kernel is first compiled:
this module imports everywhere. `compile_cubin` needs no GPU.
"""

import ctypes
import functools
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cast_serve.kernels.user_cache import write_whole

logger = logging.getLogger(__name__)


class CompileError(RuntimeError):
    """NVRTC refused a source; the message is its log."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What NVRTC is given: the source, in-memory headers, macros, and the architecture.

    Attributes:
        arch: as NVRTC writes it: "sm_90a".
    """

    name: str
    text: str
    headers: tuple[tuple[str, str], ...]
    defines: tuple[tuple[str, int], ...]
    arch: str

    @property
    def options(self) -> list[str]:
        macros = [f"-D{name}={value}" for name, value in self.defines]
        return [f"--gpu-architecture={self.arch}", "--std=c++17", *macros]


def compile_cubin(source: Source) -> bytes:
    """Machine code of `source`.

    Raises:
        CompileError: with NVRTC's log.
        ImportError: `cuda-bindings` or NVRTC is not installed.
    """
    from cuda.bindings import nvrtc

    def check(result: tuple[Any, ...]) -> Any:
        status, *values = result
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"{source.name}: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
        return values[0] if values else None

    program = check(
        nvrtc.nvrtcCreateProgram(
            source.text.encode(),
            source.name.encode(),
            len(source.headers),
            [text.encode() for _, text in source.headers],
            [name.encode() for name, _ in source.headers],
        )
    )
    try:
        options = [option.encode() for option in source.options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(check(nvrtc.nvrtcGetProgramLogSize(program)))
            check(nvrtc.nvrtcGetProgramLog(program, log))
            raise CompileError(f"{source.name} {source.options}:\n{log.decode().strip()}")
        cubin = bytearray(check(nvrtc.nvrtcGetCUBINSize(program)))
        check(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin)


def cached_cubin(source: Source, folder: Path) -> bytes:
    """`compile_cubin`, kept in `folder` under a hash of everything that goes into it.

    A file that cannot be used is named in a warning and compiled anew; where none can be kept, a
    warning says that the next start compiles again.
    """
    from cuda.bindings import nvrtc

    version = nvrtc.nvrtcVersion()[1:]
    key = hashlib.sha256(repr((source, version)).encode()).hexdigest()[:32]
    path = folder / f"{source.name.removesuffix('.cu')}-{key}.cubin"
    cubin = _read_cubin(path)
    if cubin is not None:
        return cubin
    cubin = compile_cubin(source)
    try:
        # Its hash first: the driver would take a damaged one for a broken kernel, or crash.
        write_whole(path, hashlib.sha256(cubin).digest() + cubin)
    except OSError as error:
        logger.warning("kernels are compiled again at every start: %s: %s", path, error)
    return cubin


def _read_cubin(path: Path) -> bytes | None:
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s is not used, and compiled again: %s", path, error)
        return None
    digest, cubin = stored[:32], stored[32:]
    if hashlib.sha256(cubin).digest() != digest:
        logger.warning("%s is not used, and compiled again: it is damaged", path)
        return None
    return cubin


class Function:
    """A kernel of a loaded cubin, on the current CUDA device.

    Args:
        cubin: from `compile_cubin`.
        name: the kernel's name (`extern "C"`).
        shared_bytes: dynamic shared memory of a block.
        threads: of a block.
        overlaps: launch before the kernel ahead has ended (programmatic dependent launch); the
            kernel itself waits (`griddepcontrol.wait`) before it reads what that one wrote. What
            it reads earlier must have been complete before that one began.

    Raises:
        RuntimeError: the driver's error, with the call that failed.
    """

    def __init__(
        self, cubin: bytes, name: str, *, shared_bytes: int, threads: int, overlaps: bool
    ) -> None:
        from cuda.bindings import driver

        self._driver = driver
        # The module must live as long as the function.
        self._module = checked("cuModuleLoadData", driver.cuModuleLoadData(cubin))
        self._function = checked(
            "cuModuleGetFunction", driver.cuModuleGetFunction(self._module, name.encode())
        )
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(
            "cuFuncSetAttribute",
            driver.cuFuncSetAttribute(self._function, attribute, shared_bytes),
        )
        self._threads, self._shared_bytes, self._overlaps = threads, shared_bytes, overlaps
        self._launch_config = functools.lru_cache(maxsize=1024)(self._new_launch_config)
        self._handle = int(self._function)

    def launch(self, blocks: int, arguments: list[Any], stream: int) -> None:
        """Start `blocks` blocks on `stream` (a cudaStream_t); `arguments` are ctypes objects."""
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        config = self._launch_config(blocks, stream)
        status = _launch()(config.getPtr(), self._handle, addresses, None)
        if status:
            checked("cuLaunchKernelEx", (self._driver.CUresult(status),))

    def _new_launch_config(self, blocks: int, stream: int) -> Any:
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self._threads, 1, 1
        config.sharedMemBytes = self._shared_bytes
        config.hStream = stream
        if self._overlaps:
            attribute = driver.CUlaunchAttribute()
            attribute.id = (
                driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            )
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1
        return config


@functools.cache
def _launch() -> Callable[..., int]:
    """cuLaunchKernelEx(config, function, arguments, extra), without the bindings' conversions.

    They take tens of microseconds a call, which prefill pays at every layer.
    """
    launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    launch.argtypes = [ctypes.c_void_p] * 4
    launch.restype = ctypes.c_int
    return launch


def checked(call: str, result: tuple[Any, ...]) -> Any:
    """The value of a driver call's result; RuntimeError with the driver's words if it failed."""
    from cuda.bindings import driver

    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        name = driver.cuGetErrorName(status)[1].decode()
        text = driver.cuGetErrorString(status)[1].decode()
        raise RuntimeError(f"{call}: {name}: {text}")
    return values[0] if values else None


_TENSOR_MAP_TYPES: Mapping[torch.dtype, str] = {
    torch.bfloat16: "CU_TENSOR_MAP_DATA_TYPE_BFLOAT16",
    torch.float16: "CU_TENSOR_MAP_DATA_TYPE_FLOAT16",
    torch.int32: "CU_TENSOR_MAP_DATA_TYPE_INT32",
}


def tensor_map(
    pointer: int,
    dtype: torch.dtype,
    *,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
) -> ctypes.Array[ctypes.c_char]:
    """A tensor map for TMA loads; reads outside of the tensor give zeros.

    Args:
        pointer: device address, a multiple of 16.
        shape: innermost dimension first.
        strides: bytes from one element to the next in every dimension but the innermost, multiples
            of 16.
        box: what one load brings, at most 256 in each dimension.
        swizzle: 0, 64 or 128 bytes; then that is the width of the box.

    Raises:
        RuntimeError: the driver refuses, with the call's name.
    """
    from cuda.bindings import driver

    swizzles = driver.CUtensorMapSwizzle
    encoded = checked(
        "cuTensorMapEncodeTiled",
        driver.cuTensorMapEncodeTiled(
            getattr(driver.CUtensorMapDataType, _TENSOR_MAP_TYPES[dtype]),
            len(shape),
            pointer,
            [driver.cuuint64_t(size) for size in shape],
            [driver.cuuint64_t(stride) for stride in strides],
            [driver.cuuint32_t(size) for size in box],
            [driver.cuuint32_t(1) for _ in box],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            {
                0: swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
                64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
                128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
            }[swizzle],
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
    )
    return ctypes.create_string_buffer(ctypes.string_at(int(encoded.getPtr()), 128), 128)
