"""Runs the inline assembly of Triton kernels on CPUs, inside Triton's interpreter.

Triton's interpreter runs everything but inline assembly. `install` adds that for the instructions
below, as the PTX ISA defines them for the 32 lanes of a warp, so a kernel that drives the tensor
cores by assembly is checked whole: addresses, masks, layouts, epilogue. Needs TRITON_INTERPRET=1
before Triton is imported, so it wants a process of its own.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

LANES = np.arange(32)
# Lane = 4g + t.
G, T = LANES // 4, LANES % 4

Registers = dict[str, np.ndarray]


@dataclass(frozen=True)
class _Results:
    """What `inline_asm_elementwise` asks for its results."""

    handles: tuple[interpreter.TensorHandle, ...]

    def get_result(self, index: int) -> interpreter.TensorHandle:
        return self.handles[index]


def install() -> None:
    """Give Triton's interpreter the instructions of this module."""
    interpreter.InterpreterBuilder.create_inline_asm = _create_inline_asm


def _create_inline_asm(self, asm, constraints, values, types, is_pure, pack):  # type: ignore[no-untyped-def]
    assert pack == 1, "only one element a thread and instruction"
    outputs = constraints.count("=")
    registers = {
        f"${outputs + i}": np.ascontiguousarray(value.data).reshape(-1, 32)
        for i, value in enumerate(values)
    }
    for statement in asm.strip("{}\n").split(";") if "mma" not in asm else [asm.strip(";")]:
        _execute(statement.strip(), registers)
    kinds = {"r": (np.int32, tl.int32), "f": (np.float32, tl.float32)}
    handles = []
    for i, constraint in enumerate(constraints.split(",")[:outputs]):
        numpy_type, triton_type = kinds[constraint[-1]]
        data = registers[f"${i}"].astype(numpy_type, copy=False).reshape(values[0].data.shape)
        handles.append(interpreter.TensorHandle(data, triton_type))
    return _Results(tuple(handles))


def _execute(statement: str, registers: Registers) -> None:
    if not statement or statement.startswith(".reg"):
        return
    name, _, rest = statement.partition(" ")
    operands = re.findall(r"[$\w-]+", rest)
    if name.startswith("mma.sp"):
        _mma_sp(name, operands, registers)
        return
    target, *sources = operands
    read = [registers[s] if s in registers else np.int32(int(s)) for s in sources]
    registers[target] = _INSTRUCTIONS[name](*read)


def _shfl_bfly(
    value: np.ndarray, mask: np.ndarray, clamp: np.ndarray, members: np.ndarray
) -> np.ndarray:
    assert clamp == 31 and members == -1, "only whole warps"
    return value[:, LANES ^ mask]


_INSTRUCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "setp.ne.s32": lambda a, b: a != b,
    "selp.b32": lambda a, b, p: np.where(p, a, b),
    "shfl.sync.bfly.b32": _shfl_bfly,
}


def _floats(words: np.ndarray, kind: str) -> np.ndarray:
    """[...] words -> fp32 [..., 2], the low half first."""
    halves = np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2)
    if kind == "bf16":
        return (halves.astype(np.uint32) << 16).view(np.float32)
    return halves.view(np.float16).astype(np.float32)


def _mma_sp(name: str, operands: list[str], registers: Registers) -> None:
    """mma.sp::ordered_metadata.m16n8k32: PTX ISA, "Matrix fragments for sparse mma.m16n8k32"."""
    shape = re.fullmatch(
        r"mma\.sp::ordered_metadata\.sync\.aligned\.m16n8k32\.row\.col\.f32\.(bf16|f16)\.\1\.f32",
        name,
    )
    assert shape, f"not an instruction this knows: {name}"
    out, sources, selector = operands[:4], operands[4:17], int(operands[17], 16)
    words = [registers[source] for source in sources]
    warps = words[0].shape[0]

    # A: register i of lane (g, t) is row g + 8 (i % 2), group t + 4 (i // 2); two kept each.
    kept = np.empty((warps, 16, 8, 2), np.float32)
    for i in range(4):
        kept[:, G + 8 * (i % 2), T + 4 * (i // 2)] = _floats(words[i], shape[1])
    # B: register j of lane (g, t) is rows k = 8j + 2t, 8j + 2t + 1 of column g.
    b = np.empty((warps, 32, 8), np.float32)
    for j in range(4):
        pair = _floats(words[4 + j], shape[1])
        b[:, 8 * j + 2 * T, G], b[:, 8 * j + 2 * T + 1, G] = pair[..., 0], pair[..., 1]
    # Metadata of row r, group q: lane t = 2 selector + q // 4 of the quad r % 8, half r // 8.
    row, group = np.arange(16)[:, None], np.arange(8)[None, :]
    lane = 4 * (row % 8) + 2 * selector + group // 4
    code = words[12].view(np.uint32)[:, lane] >> (16 * (row // 8) + 4 * (group % 4)) & 15
    index = np.stack((code & 3, code >> 2), axis=-1).astype(np.int64)
    assert (index[..., 0] < index[..., 1]).all(), "ordered metadata must ascend"
    column = 4 * group[..., None] + index

    # Only kept entries are multiplied, so an infinite B meets no zero that is not stored.
    chosen = np.take_along_axis(b[:, None], column.reshape(warps, 16, 16, 1), axis=2)
    with np.errstate(invalid="ignore", over="ignore"):
        product = (kept.reshape(warps, 16, 16, 1) * chosen).sum(axis=2)
        for i in range(4):
            # D, as C: register i of lane (g, t) is row g + 8 (i // 2), column 2t + i % 2.
            registers[out[i]] = words[8 + i] + product[:, G + 8 * (i // 2), 2 * T + i % 2]
