"""Compiles Triton kernels for GPUs that are not there, and reads from the result what matters."""

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory a program may have: CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability", less the 1 KB that the system keeps.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One kernel for one GPU: its TTGIR and PTX, and what its machine code takes."""

    ttgir: str
    ptx: str
    registers: int
    stack_bytes: int
    shared_bytes: int

    @property
    def loop(self) -> str:
        """The TTGIR of the first loop."""
        start = self.ttgir.index("scf.for")
        return self.ttgir[start : self.ttgir.index("scf.yield", start)]

    @property
    def assembly_layouts(self) -> set[str]:
        """The layouts of the tensors that inline assembly reads and writes."""
        lines = [line for line in self.ttgir.splitlines() if "elementwise_inline_asm" in line]
        names = {name for line in lines for name in re.findall(r"x[if]32, (#\w+)>", line)}
        return {
            found[1]
            for name in names
            if (found := re.search(rf"^{name} = (.*)$", self.ttgir, re.MULTILINE))
        }

    def count(self, pattern: str) -> int:
        """How often the regular expression `pattern` occurs in the PTX."""
        return len(re.findall(pattern, self.ptx))


def compile_for(
    sm: int,
    kernel: triton.JITFunction,
    types: Mapping[str, str],
    constants: Mapping[str, object],
    *,
    aligned: Sequence[str],
    num_warps: int,
) -> Compiled:
    """Compile `kernel` for compute capability `sm`, on any machine.

    Args:
        types: argument -> Triton type, such as "*bf16" or "i32".
        constants: the compile-time arguments.
        aligned: arguments that are multiples of 16, as launching finds out by itself.
    """
    names = list(kernel.arg_names)
    source = ASTSource(
        fn=kernel,
        signature={**types, **dict.fromkeys(constants, "constexpr")},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": 1}
    built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    registers, stack_bytes = resources_of(built.asm["cubin"])
    return Compiled(
        ttgir=built.asm["ttgir"],
        ptx=built.asm["ptx"],
        registers=registers,
        stack_bytes=stack_bytes,
        shared_bytes=built.metadata.shared,
    )


def resources_of(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread; a stack is where spilled registers go."""
    usage = _run_tool("cuobjdump", "-res-usage", cubin=cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, f"cuobjdump says no registers: {usage}"
    return int(found[1]), int(found[2])


def disassemble(cubin: bytes) -> str:
    """SASS."""
    return _run_tool("nvdisasm", cubin=cubin)


def _run_tool(tool: str, *options: str, cubin: bytes) -> str:
    """Output of one of the CUDA tools that Triton carries."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_TOOLS / tool, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
