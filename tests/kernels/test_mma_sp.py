import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cast_serve.kernels.metadata import group_codes
from cast_serve.kernels.mma_sp import SPEC, Config, metadata_layout
from cast_serve.kernels.packing import pack
from cast_serve.kernels.pattern import nm_mask
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.reference import spmm_ref

SUPPORT = Path(__file__).parents[1] / "support"

# Half the distance between neighbours, and the sum's own error. Triton's interpreter cuts off where
# a GPU rounds to bf16: the whole distance.
ROUNDING = {"bfloat16": 2**-8 + 1e-4, "float16": 2**-11 + 1e-4}
EMULATED_ROUNDING = {**ROUNDING, "bfloat16": 2**-7 + 1e-4}


def problem(
    N: int = 4096,
    K: int = 4096,
    *,
    dtype: torch.dtype = torch.bfloat16,
    capability: tuple[int, int] = (9, 0),
) -> Problem:
    return Problem(N=N, K=K, dtype=dtype, capability=capability, gpu="test")


def packed(N: int, K: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(N + K))
    return pack((weight * nm_mask(weight)).to(dtype))


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        pytest.param(problem(N=4100), "N=4100 is not a multiple of 16", id="N"),
        pytest.param(problem(K=4128), "K=4128 is not a multiple of 64", id="K"),
        pytest.param(problem(capability=(7, 5)), "needs sm_80, this GPU is sm_75", id="turing"),
        pytest.param(problem(capability=(10, 0)), "this GPU is sm_100", id="sm_100"),
        pytest.param(problem(capability=(12, 0)), "this GPU is sm_120", id="sm_120"),
        pytest.param(
            problem(dtype=torch.float32), "float32 is not one of bfloat16 and float16", id="dtype"
        ),
    ],
)
def test_supports_refuses(asked: Problem, reason: str):
    assert reason in (SPEC.supports(asked) or "")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0)])
def test_supports(capability: tuple[int, int]):
    assert SPEC.supports(problem(N=16, K=64, capability=capability)) is None


@pytest.mark.parametrize("name", ["", "r3-u4-n1-k8-t1-s1", "r1-u4-n1-k8-t1-s0", "r1-u4-n1-k8-t1"])
def test_config_refuses(name: str):
    with pytest.raises(ValueError, match="mma_sp has no config"):
        Config.parse(name)


@pytest.mark.parametrize("M", [1, 8, 9, 16, 32, 33, 64, 500])
@pytest.mark.parametrize(("N", "K"), [(16, 64), (960, 576), (4096, 14336), (28672, 4096)])
def test_configs(M: int, N: int, K: int):
    names = SPEC.configs(problem(N, K), M)
    assert 1 <= len(names) <= 12 and len(set(names)) == len(names)
    for name in names:
        config = Config.parse(name)
        assert config.warps <= 16
        assert config.tokens < 2 * max(M, 8)


def test_metadata_layout():
    _, mask = packed(32, 320, torch.bfloat16)
    words = metadata_layout(mask).view(2, 2, 32, 4)
    codes = group_codes(mask)
    tile, step, lane, nibble = 1, 2, 4 * 5 + 3, 1
    word = int(words[tile, step // 4, lane, step % 4]) & 0xFFFFFFFF
    group = step * 16 + 4 * nibble + 3
    assert word >> (4 * nibble) & 15 == codes[16 * tile + 5, group]
    assert word >> (16 + 4 * nibble) & 15 == codes[16 * tile + 13, group]


def test_metadata_layout_bytes():
    _, mask = packed(64, 512, torch.bfloat16)
    assert metadata_layout(mask).nbytes == mask.nbytes


def test_metadata_layout_refuses():
    with pytest.raises(ValueError, match="N=24 K=64"):
        metadata_layout(torch.zeros(24, 8, dtype=torch.uint8))


def case(config: str, M: int, N: int, K: int, **changes: object) -> dict:
    plain = {"dtype": "bfloat16", "bias": False, "gap": 0, "special": []}
    return {"config": config, "M": M, "N": N, "K": K, **plain, **changes}


# Each: whole kernel, instructions emulated. K = 576 and 320 leave warps and steps without work.
EMULATED = {
    "least": case("r1-u2-n1-k4-t1-s1", 1, 16, 64),
    "prefetched": case("r1-u4-n1-k2-t1-s1-x", 7, 16, 1536, bias=True),
    "fp16": case("r2-u4-n1-k2-t1-s1", 8, 64, 512, dtype="float16", bias=True),
    "rows-past-N": case("r4-u1-n2-k2-t1-s1", 5, 48, 192),
    "tokens-past-M": case("r2-u2-n2-k2-t2-s1", 19, 64, 576, bias=True),
    "splits": case("r1-u4-n1-k2-t2-s2", 9, 32, 576, bias=True, dtype="float16"),
    "wide": case("r2-u1-n2-k1-t8-s1", 67, 64, 128, gap=8),
    "inf-and-nan": case(
        "r2-u2-n1-k4-t1-s1", 6, 32, 320, gap=8, special=[[2, 70, "inf"], [5, 319, "nan"]]
    ),
}


@pytest.fixture(scope="module")
def emulated() -> dict[str, dict]:
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run(
        [sys.executable, SUPPORT / "mma_sp_emulated.py", json.dumps(list(EMULATED.values()))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(EMULATED, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", EMULATED)
def test_mma_sp_emulated(emulated: dict[str, dict], name: str):
    result = emulated[name]
    assert result["error"] <= EMULATED_ROUNDING[EMULATED[name]["dtype"]]
    assert result["finite_where_unused"] and result["special_where_used"]


def test_specializations():
    """Sizes, strides and the bias choose no new binary: what prepare compiled serves every M."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import create_function_from_signature

    from cast_serve.kernels.mma_sp_triton import mma_sp_kernel

    kernel = mma_sp_kernel
    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    config = Config.parse("r1-u4-n1-k8-t1-s1")
    x, metadata = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.int32)
    keys = set()
    for M, N, steps, stride, bias in [(1, 16, 1, 8, x), (2, 48, 7, 9, x[1:]), (16, 4096, 64, 1, x)]:
        _, key, _ = bind(
            *(x, x, metadata, bias, x, M, N, steps, stride, M % 2),
            **config.constants(torch.bfloat16, 4096),
            num_warps=config.warps,
            num_stages=1,
        )
        keys.add(str(key))
    assert len(keys) == 1


GPU_CONFIGS = sorted(
    {n for M in (1, 16, 32, 64) for n in SPEC.configs(problem(256, 4096), M)},
    key=lambda name: (Config.parse(name).tokens, name),
)


def device_problem(N: int, K: int, dtype: torch.dtype) -> Problem:
    asked = Problem.on(torch.device("cuda"), N=N, K=K, dtype=dtype)
    reason = SPEC.supports(asked)
    if reason:
        pytest.skip(f"mma_sp: {reason}")
    return asked


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CONFIGS)
def test_mma_sp_configs(name: str):
    """Every config, at a K of whole rounds and one that leaves warps without work."""
    for N, K in [(80, 4096), (48, 1600)]:
        device_problem(N, K, torch.bfloat16)
        values, mask = packed(N, K, torch.bfloat16)
        M = Config.parse(name).tokens + 3
        x = torch.randn(M, K).bfloat16()
        expected = spmm_ref(x.float(), values, mask)
        y = SPEC.run(x.cuda(), values.cuda(), metadata_layout(mask).cuda(), None, name).cpu()
        error = (y.float() - expected).abs() / (expected.abs() + 1e-2 * expected.abs().max())
        assert error.max() <= ROUNDING["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["r1-u4-n1-k8-t1-s1", "r1-u4-n1-k8-t1-s2"])
def test_prepare_is_enough(name: str):
    """After prepare, a CUDA graph captures the first run of the layer and replays it exactly."""
    N, K = 512, 4096
    asked = device_problem(N, K, torch.float16)
    SPEC.prepare(asked, name, 4)
    values, mask = packed(N, K, torch.float16)
    values, metadata = values.cuda(), metadata_layout(mask).cuda()
    x, bias = torch.randn(4, K).half().cuda(), torch.randn(N).half().cuda()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = SPEC.run(x, values, metadata, bias, name)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, SPEC.run(x, values, metadata, bias, name))


@pytest.mark.gpu
def test_mma_sp_refuses_unaligned():
    values, mask = packed(16, 64, torch.bfloat16)
    x = torch.randn(2, 65).bfloat16().cuda()[:, 1:]
    with pytest.raises(ValueError, match=r"pass x\.contiguous\(\)"):
        SPEC.run(x, values.cuda(), metadata_layout(mask).cuda(), None, "r1-u2-n1-k4-t1-s1")
