"""mma_sp compiled ahead of time for the GPUs it supports: what speed rests on, without a GPU."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from aot import SHARED_LIMIT, Compiled, compile_for

from cast_serve.kernels.mma_sp import Config
from cast_serve.kernels.mma_sp_triton import mma_sp_kernel, reduce_kernel

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}
INTEGERS = dict.fromkeys(("M", "N", "steps", "x_stride", "has_bias"), "i32")
ALIGNED = ("x_ptr", "values_ptr", "metadata_ptr", "y_ptr")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(sm: int, name: str, dtype: torch.dtype, K: int) -> Compiled:
    config, pointer = Config.parse(name), TYPES[dtype]
    y = pointer if config.splits == 1 else "*fp32"
    pointers = dict(zip(ALIGNED, (pointer, pointer, "*i32", y), strict=True))
    return compile_for(
        sm,
        mma_sp_kernel,
        {**pointers, "bias_ptr": pointer, **INTEGERS},
        config.constants(dtype, K),
        aligned=ALIGNED,
        num_warps=config.warps,
    )


def check(sm: int, name: str, built: Compiled) -> None:
    config = Config.parse(name)
    r, u, t = config.tiles, config.depth, config.token_tiles
    assert built.count(r"mma\.sp::ordered_metadata") == 2 * r * t * u
    # Weights before the loop and in it; x too if it is loaded as early.
    weights = 2 * (2 * r * u + (r if u == 4 else 0))
    x = 2 * t * u * (2 if config.ahead else 1)
    assert built.count(r"ld\.global\S*\.v4\.b32") == weights + x
    assert built.count(r"ld\.global\S*evict_first\S*\.v4\.b32") == weights
    assert "convert_layout" not in built.loop
    # Element i is in thread i: what makes a 1-D tensor a register.
    assert built.assembly_layouts == {
        "#ttg.blocked<{sizePerThread = [1], threadsPerWarp = [32], "
        f"warpsPerCTA = [{config.warps}], order = [0]}}>"
    }
    assert built.stack_bytes == 0
    assert built.registers * 32 * config.warps <= 65536
    assert built.shared_bytes <= SHARED_LIMIT[sm]


@pytest.mark.parametrize("sm", [80, 86, 89, 90])
@pytest.mark.parametrize(
    ("name", "K", "dtype"),
    [
        ("r1-u4-n1-k8-t1-s1", 4096, torch.bfloat16),
        ("r1-u4-n1-k8-t1-s1-x", 11008, torch.float16),
        ("r2-u2-n1-k8-t2-s2", 14336, torch.bfloat16),
        ("r2-u1-n2-k4-t4-s1", 576, torch.bfloat16),
    ],
)
def test_mma_sp_compiles(sm: int, name: str, K: int, dtype: torch.dtype):
    check(sm, name, compiled(sm, name, dtype, K))


def test_mma_sp_compiles_for_64_tokens():
    name = "r2-u2-n2-k4-t8-s1"
    check(90, name, compiled(90, name, torch.bfloat16, 4096))


def test_reduce_compiles():
    built = compile_for(
        80,
        reduce_kernel,
        {"parts_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16", "M": "i32", "N": "i32"}
        | {"has_bias": "i32"},
        {"SPLITS": 4, "BLOCK": 512},
        aligned=("parts_ptr", "y_ptr"),
        num_warps=4,
    )
    assert built.stack_bytes == 0
