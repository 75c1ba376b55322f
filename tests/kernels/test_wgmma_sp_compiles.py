"""wgmma_sp compiled ahead of time by NVRTC, for Hopper: what speed rests on, without a GPU."""

import re
from functools import cache

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")

from aot import SHARED_LIMIT, disassemble, resources_of

from cast_serve.kernels import wgmma_sp
from cast_serve.kernels.nvrtc import CompileError, Source, compile_cubin
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.wgmma_sp_source import ELEMENTS, Config, Element, source

E4M3 = Element(name="e4m3", bytes=1, columns=64, steps_a_word=1)
REGISTERS_PER_SM = 65536


@cache
def every_config() -> list[str]:
    """What `configs` names for a layer of any size at any M."""
    names: dict[str, None] = {}
    for N, K in ((64, 64), (576, 576), (4096, 14336), (28672, 4096)):
        problem = Problem(N=N, K=K, dtype=torch.bfloat16, capability=(9, 0), gpu="NVIDIA H100")
        for M in (1, 9, 32, 64, 128, 512, 1024, 8192):
            names |= dict.fromkeys(wgmma_sp.configs(problem, M))
    return list(names)


def compiled(name: str, element: Element = ELEMENTS[torch.bfloat16]) -> bytes:
    return compile_cubin(source(Config.parse(name), element, torch.bfloat16))


@pytest.mark.parametrize("name", every_config())
def test_compiles(name):
    config = Config.parse(name)
    cubin = compiled(name)
    registers, stack_bytes = resources_of(cubin)
    assert stack_bytes == 0
    # Handed out to a warp in units of 8 a thread.
    registers = -(-registers // 8) * 8
    assert registers * config.threads * config.ctas <= REGISTERS_PER_SM
    assert config.shared_bytes <= SHARED_LIMIT[90]
    assert (config.shared_bytes + 1024) * config.ctas <= 228 * 1024
    assert config.stages >= 2

    code = disassemble(cubin)
    # The loop over K is unrolled by two, and its last stage stands after it.
    shape = f"64x{config.tokens}x32"
    assert len(re.findall(rf"HGMMA\.SP\.{shape}\.F32\.BF16", code)) == (
        3 * config.tiles * config.width // 64
    )
    assert "UTMALDG" in code and "LDG" not in re.sub(r"UTMALDG|LDG\.E\.U16", "", code)
    # A wait for all memory traffic, which halved the speed where each stage had one: only where
    # many partial sums are left for others to read.
    assert code.count("MEMBAR.ALL.GPU") == int(config.leaves_sums)


def test_float16_compiles():
    cubin = compiled("g1x1-t8-w256-k2-o2", ELEMENTS[torch.float16])
    assert "HGMMA.SP.64x8x32.F32 " in disassemble(cubin)


def test_fp8_is_a_row_of_the_table():
    """The same source serves 8-bit elements; what is missing for FP8 is its metadata order."""
    assert "QGMMA.SP.64x8x64.F32.E4M3.E4M3" in disassemble(compiled("g1x1-t8-w256-k2-o2", E4M3))


def test_compile_error_has_the_log():
    broken = Source(name="x.cu", text="int f( {", headers=(), defines=(), arch="sm_90a")
    with pytest.raises(CompileError, match=r"(?s)x\.cu.*error"):
        compile_cubin(broken)
