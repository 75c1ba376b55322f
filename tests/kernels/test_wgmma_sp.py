"""What wgmma_sp decides without a GPU: supported problems, configs, and the order of metadata."""

import pytest
import torch
from layers import random_packed

from cast_serve.kernels import wgmma_sp
from cast_serve.kernels.metadata import PADDING_CODE, group_codes
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.wgmma_sp_source import Config


def problem(
    N: int = 4096,
    K: int = 4096,
    *,
    dtype: torch.dtype = torch.bfloat16,
    capability: tuple[int, int] = (9, 0),
) -> Problem:
    return Problem(N=N, K=K, dtype=dtype, capability=capability, gpu="a GPU")


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (problem(), None),
        (problem(16, 64, dtype=torch.float16), None),
        (problem(capability=(8, 9)), "needs Hopper (sm_90), this GPU is sm_89"),
        (problem(capability=(10, 0)), "needs Hopper (sm_90), this GPU is sm_100"),
        (problem(capability=(12, 0)), "needs Hopper (sm_90), this GPU is sm_120"),
        (problem(dtype=torch.float32), "float32 is neither bfloat16 nor float16"),
        (problem(N=24), "N=24 is not a multiple of 16"),
        (problem(K=72), "K=72 is not a multiple of 16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_supports(asked, reason):
    assert wgmma_sp.supports(asked) == reason


@pytest.mark.parametrize("M", [1, 8, 9, 32, 33, 64, 65, 512, 1000, 5000, 70000])
@pytest.mark.parametrize(("N", "K"), [(16, 64), (576, 576), (28672, 4096)])
def test_configs(N, K, M):
    names = wgmma_sp.configs(problem(N, K), M)
    assert names and len(set(names)) == len(names)
    for name in names:
        config = Config.parse(name)
        # A part of K that is empty would leave its CTA nothing to add.
        assert config.split <= -(-2 * K // config.width)
        assert config.split * config.share <= 8
        # A box of the copy engine.
        assert max(config.rows, config.tokens) <= 256


def test_config_name_is_refused():
    with pytest.raises(ValueError, match="'g1-t8' is no config; one is g2x1-t64-w256-k4-o1"):
        Config.parse("g1-t8")


@pytest.mark.parametrize("element_bytes", [1, 2])
def test_metadata_layout(element_bytes):
    """Each word against the PTX ISA's figures, spelled out."""
    N, K = 80, 192
    mask = random_packed(N, K, torch.bfloat16, "cpu")[1]
    words = wgmma_sp.metadata_layout(mask, element_bytes=element_bytes)
    assert words.shape == (2, 4, 128) and words.dtype == torch.int32
    codes = torch.full((128, 256 // 4), PADDING_CODE)
    codes[:N, : K // 4] = group_codes(mask)
    for block, step, thread in ((0, 0, 0), (0, 1, 5), (1, 2, 3), (0, 2, 78), (1, 3, 127)):
        warp, g, t = thread // 32, thread % 32 // 4, thread % 4
        row = 64 * block + 16 * warp + g
        if element_bytes == 2:
            low, high = (codes[r, 16 * step + 4 * t :][:4] for r in (row, row + 8))
            expected = [*low, *high]
        else:
            expected = codes[row + 8 * (t % 2), 16 * step + 8 * (t // 2) :][:8]
        word = words[block, step, thread].item()
        assert [word >> 4 * i & 0xF for i in range(8)] == [code.item() for code in expected]
