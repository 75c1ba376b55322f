"""Safetensors headers, read and checked without loading data.

  Layout   8 bytes little-endian header length, JSON header, then the tensors end to end in the
           order of their offsets (https://github.com/huggingface/safetensors#format).

The size of the file is compared with what the header promises, so a truncated download is found
before anything is loaded from it. Whatever lies in a file, reading its header takes memory and time
in proportion to its length (scripts/fuzz_headers.py): files come from strangers.
"""

import json
import math
import reprlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from cast_serve.model_loaders.errors import CheckpointError

LENGTH_BYTES = 8
# The limit of the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000
# Those of PyTorch's operators, and of its sizes and strides.
MAX_DIMENSIONS = 64
MAX_SIZE = 2**63 - 1
# In an error message too.
MAX_NAME_LENGTH = 1000

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}

# What stands in a header instead may be of any length and depth.
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200

_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies: bytes [start, end) of `file`."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name, in the order they lie in it.

    Raises:
        CheckpointError: the file cannot be read, is not safetensors, is truncated, or has a header
            whose dtypes, shapes and offsets do not fit together; names the tensor where one does.
    """
    if not file.is_file():
        raise CheckpointError(file, "no such file; download the checkpoint again")
    try:
        with file.open("rb") as stream:
            header, data_start, size = _read_json(file, stream)
    except OSError as error:
        raise CheckpointError(file, f"cannot be read: {error.strerror}") from error
    header.pop("__metadata__", None)
    entries = [_entry(file, name, raw, data_start) for name, raw in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    end = data_start
    for entry in entries:
        if entry.start != end:
            what = "overlaps the tensor before it" if entry.start < end else "leaves a hole"
            raise CheckpointError(
                file,
                f"data at bytes {entry.start}-{entry.end} {what}; the file is damaged",
                entry.name,
            )
        end = entry.end
    if size < end:
        last = next(entry for entry in entries if entry.end > size)
        raise CheckpointError(
            file,
            f"truncated: {size} bytes of {end}; download it again",
            last.name,
        )
    if size > end:
        raise CheckpointError(
            file, f"{size - end} bytes follow the last tensor; the file is damaged"
        )
    return {entry.name: entry for entry in entries}


def _read_json(file: Path, stream: BinaryIO) -> tuple[dict[str, Any], int, int]:
    """The header as JSON, where data starts, and the size of the file."""
    size = stream.seek(0, 2)
    stream.seek(0)
    prefix = stream.read(len(_LFS_POINTER))
    if prefix == _LFS_POINTER:
        raise CheckpointError(file, "is a Git LFS pointer, not the weights; run `git lfs pull`")
    if size < LENGTH_BYTES:
        raise CheckpointError(
            file, f"truncated: {size} bytes are no safetensors file; download it again"
        )
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            file,
            f"header length {length} is over the limit of {MAX_HEADER_BYTES}; "
            "this is not a safetensors file",
        )
    if length > size - LENGTH_BYTES:
        raise CheckpointError(
            file,
            f"truncated: {size} bytes cannot hold a header of {length}; download it again",
        )
    stream.seek(LENGTH_BYTES)
    try:
        # decode(): from bytes, json would take UTF-16 and UTF-32 as well.
        header = json.loads(stream.read(length).decode(), object_pairs_hook=_no_duplicates)
    # RecursionError: the JSON scanner on a header of nothing but brackets.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            file, f"header is not valid JSON ({error}); the file is damaged"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(file, "header is not a JSON object; the file is damaged")
    return header, LENGTH_BYTES + length, size


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{_short.repr(twice)} appears twice")
    return found


def _entry(file: Path, name: str, raw: Any, data_start: int) -> TensorEntry:
    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(file, f"{reason}; the file is damaged", name)

    if len(name) > MAX_NAME_LENGTH or not _is_unicode(name):
        name, whole = _short.repr(name), len(name)
        raise refuse(f"a tensor's name of {whole} characters is too long, or not Unicode")
    if not isinstance(raw, dict) or not {"dtype", "shape", "data_offsets"} <= raw.keys():
        raise refuse("header entry needs dtype, shape and data_offsets")
    dtype = DTYPES.get(raw["dtype"]) if isinstance(raw["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            file, f"dtype {_short.repr(raw['dtype'])} is not one of {', '.join(DTYPES)}", name
        )
    shape, offsets = raw["shape"], raw["data_offsets"]
    if not _is_sizes(shape) or not _has_strides(shape):
        raise refuse(f"shape {_short.repr(shape)} is not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"data_offsets {_short.repr(offsets)} are not [start, end]")
    stored, expected = offsets[1] - offsets[0], math.prod(shape) * dtype.itemsize
    if stored != expected:
        said = f"shape {_short.repr(shape)} of {raw['dtype']}"
        raise refuse(f"{said} takes {expected} bytes, not {stored}")
    return TensorEntry(
        name=name,
        file=file,
        dtype=dtype,
        shape=tuple(shape),
        start=data_start + offsets[0],
        end=data_start + offsets[1],
    )


def _is_sizes(value: Any) -> bool:
    # type(), not isinstance: JSON true is an int in Python.
    return (
        isinstance(value, list)
        and len(value) <= MAX_DIMENSIONS
        and all(type(size) is int and 0 <= size <= MAX_SIZE for size in value)
    )


def _has_strides(shape: list[int]) -> bool:
    # Also of a tensor without elements.
    return math.prod(size for size in shape if size) <= MAX_SIZE


def _is_unicode(name: str) -> bool:
    # JSON's \ud800 makes half a character, which can be neither printed nor stored.
    return not any("\ud800" <= character <= "\udfff" for character in name)
