"""cusparselt_abi: the cuSPARSELt C functions that `cusparselt` calls, declared for ctypes.

  Covers   cuSPARSELt 0.7.1 to 0.8.1 for CUDA 12 and 13, which torch 2.11 and later bring along.
  Source   docs.nvidia.com/cuda/cusparselt and cusparseLt.h of the nvidia-cusparselt-cu12 0.7.1 and
           nvidia-cusparselt-cu13 0.8.0 and 0.8.1 wheels; names and numbers only.
  Why      torch._cslt_sparse_mm builds descriptors and a plan on every call (50-460 us of host
           time on an H200) and is deprecated. The library is the one torch has loaded already.

Every function returns a status; `Library.call` raises CusparseltError unless it is zero.
"""

import ctypes
import functools
import importlib.metadata
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass

import torch

SONAME = "libcusparseLt.so.0"
DISTRIBUTIONS = ("nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12")
MIN_VERSION = (0, 7, 1)

# The five opaque structs are the caller's memory: 1024 bytes each in 0.7.1; from 0.8.0 on 512,
# aligned to 16.
OPAQUE_BYTES = 1024
OPAQUE_ALIGNMENT = 16
# Alignment of matrices that a descriptor promises; the library takes multiples of 16 only.
POINTER_ALIGNMENT = 16

# cusparseOperation_t, cusparseOrder_t, cusparseLtSparsity_t, cusparseLtMatmulAlg_t,
# cusparseLtMatmulAlgAttribute_t
NON_TRANSPOSE, TRANSPOSE = 0, 1
ORDER_COLUMN, ORDER_ROW = 1, 2
SPARSITY_50_PERCENT = 0
ALG_DEFAULT = 0
ALG_CONFIG_ID = 0


@dataclass(frozen=True, kw_only=True)
class Element:
    """How an element type of weight and x is described to the library.

    Attributes:
        value: cudaDataType of weight and x.
        result: cudaDataType of y.
        compute: cusparseComputeType.
        multiple: N and K must be multiples of it: 32 bytes of elements, as the library asks of a
            structured matrix. Dense ones need 16 bytes, which M buckets of 16 satisfy too.
    """

    value: int
    result: int
    compute: int
    multiple: int


_R_16F, _R_16BF, _COMPUTE_32F = 2, 14, 2

ELEMENTS = {
    torch.bfloat16: Element(value=_R_16BF, result=_R_16BF, compute=_COMPUTE_32F, multiple=16),
    torch.float16: Element(value=_R_16F, result=_R_16F, compute=_COMPUTE_32F, multiple=16),
}

_OPAQUE = c_void_p
_MATRIX = (c_int64, c_int64, c_int64, c_uint32, c_int, c_int)
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "cusparseLtInit": (_OPAQUE,),
    "cusparseLtGetProperty": (c_int, POINTER(c_int)),
    # handle, descriptor, then rows, cols, ld, alignment, type, order (and sparsity)
    "cusparseLtDenseDescriptorInit": (_OPAQUE, _OPAQUE, *_MATRIX),
    "cusparseLtStructuredDescriptorInit": (_OPAQUE, _OPAQUE, *_MATRIX, c_int),
    # handle, descriptor, opA, opB, A, B, C, D, compute
    "cusparseLtMatmulDescriptorInit": (_OPAQUE, _OPAQUE, c_int, c_int, *(_OPAQUE,) * 4, c_int),
    # handle, selection, matmul descriptor, algorithm
    "cusparseLtMatmulAlgSelectionInit": (_OPAQUE, _OPAQUE, _OPAQUE, c_int),
    # handle, selection, attribute, data, bytes
    "cusparseLtMatmulAlgSetAttribute": (_OPAQUE, _OPAQUE, c_int, c_void_p, c_size_t),
    # handle, plan, matmul descriptor, selection
    "cusparseLtMatmulPlanInit": (_OPAQUE, _OPAQUE, _OPAQUE, _OPAQUE),
    "cusparseLtMatmulGetWorkspace": (_OPAQUE, _OPAQUE, POINTER(c_size_t)),
    # handle, plan, alpha, A, B, beta, C, D, workspace, streams, number of streams
    "cusparseLtMatmul": (*(c_void_p,) * 9, POINTER(c_void_p), c_int32),
    # handle, structured descriptor, bytes compressed, bytes of scratch
    "cusparseLtSpMMACompressedSize2": (_OPAQUE, _OPAQUE, POINTER(c_size_t), POINTER(c_size_t)),
    # handle, structured descriptor, is it A, its op, dense, compressed, scratch, stream
    "cusparseLtSpMMACompress2": (_OPAQUE, _OPAQUE, c_int, c_int, *(c_void_p,) * 4),
}


class CusparseltError(RuntimeError):
    """A cuSPARSELt function failed; says which and why."""


class LibraryNotFoundError(RuntimeError):
    """libcusparseLt cannot be loaded, or is too old; says what was tried."""


class Opaque:
    """Zeroed, aligned memory for one of the library's structs; ctypes passes its address."""

    def __init__(self) -> None:
        self._memory = (ctypes.c_uint8 * (OPAQUE_BYTES + OPAQUE_ALIGNMENT))()
        start = ctypes.addressof(self._memory)
        self._as_parameter_ = start + -start % OPAQUE_ALIGNMENT


class Library:
    """libcusparseLt with its functions declared.

    Attributes:
        version: (major, minor, patch) of the library loaded, not of any package installed.
        matmul: cusparseLtMatmul, unchecked, for the one call where a microsecond counts.
    """

    def __init__(self, shared: ctypes.CDLL) -> None:
        self._shared = shared
        for name, argtypes in _SIGNATURES.items():
            function = getattr(shared, name)
            function.argtypes, function.restype = argtypes, c_int
        self.matmul = shared.cusparseLtMatmul
        self.version = (self._property(0), self._property(1), self._property(2))

    def call(self, function: str, *arguments: object) -> None:
        """Call `function`; raise CusparseltError, naming it, if it fails."""
        self.check(getattr(self._shared, function)(*arguments), function)

    def check(self, status: int, function: str) -> None:
        """Raise CusparseltError, naming `function`, unless `status` is zero."""
        if status:
            version = ".".join(map(str, self.version))
            raise CusparseltError(f"{function}: {self._message(status)} (cuSPARSELt {version})")

    def _message(self, status: int) -> str:
        # 0.7.1 declares the function in its header but does not have it.
        if not hasattr(self._shared, "cusparseLtGetErrorString"):
            return f"status {status} of cusparseStatus_t"
        text = self._shared.cusparseLtGetErrorString
        text.argtypes, text.restype = (c_int,), c_char_p
        return f"{text(status).decode()} (status {status})"

    def _property(self, kind: int) -> int:
        value = c_int()
        status = self._shared.cusparseLtGetProperty(kind, ctypes.byref(value))
        if status:
            raise CusparseltError(f"cusparseLtGetProperty({kind}): {self._message(status)}")
        return value.value


@functools.cache
def load() -> Library:
    """The cuSPARSELt of this process, loaded once.

    Raises:
        LibraryNotFoundError: not installed, cannot be loaded, or older than MIN_VERSION.
    """
    library = Library(open_shared(SONAME, DISTRIBUTIONS))
    if library.version < MIN_VERSION:
        found, needed = (".".join(map(str, v)) for v in (library.version, MIN_VERSION))
        raise LibraryNotFoundError(f"cuSPARSELt {found} is too old: needs {needed} or later")
    return library


def loaded_version() -> str:
    """As "0.8.1", of the library that is loaded, not what torch was built with; or "none"."""
    try:
        return ".".join(map(str, load().version))
    except (LibraryNotFoundError, CusparseltError):
        return "none"


def open_shared(soname: str, distributions: tuple[str, ...]) -> ctypes.CDLL:
    """dlopen `soname`, which finds what torch has loaded, else the copy in a Python package.

    Raises:
        LibraryNotFoundError: none of them can be loaded; lists each with its reason.
    """
    tried = []
    for candidate in (soname, *_packaged(soname, distributions)):
        try:
            return ctypes.CDLL(candidate)
        except OSError as error:
            tried.append(str(error))
    raise LibraryNotFoundError(
        f"cuSPARSELt cannot be loaded: {'; '.join(tried)}; packages searched: "
        f"{', '.join(distributions) or 'none'}. Install the one for the CUDA of torch "
        f"({torch.version.cuda or 'this torch has none'})"
    )


def _packaged(soname: str, distributions: tuple[str, ...]) -> Iterator[str]:
    for name in distributions:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        yield from (str(file.locate()) for file in files if file.name == soname)
