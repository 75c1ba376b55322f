"""What a layer keeps on the GPU: one copy of the values, and no more bytes than promised."""

import pytest
import torch
from layers import random_packed

from cast_serve.kernels import cusparselt
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.weight import build

# o_proj of Llama-3.1-8B, and the same in small.
N, K = 4096, 4096
SMALL = 256

DTYPES = [torch.bfloat16, torch.float16]


def share(values: torch.Tensor, mask: torch.Tensor, layouts: tuple[str, ...]) -> float:
    """Resident bytes as part of the dense weight's."""
    return build(values, mask, layouts).resident_bytes / (2 * values.nbytes)


@pytest.mark.parametrize("layouts", [("mma_sp",), ("wgmma_sp",), ("mask",)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_layout(layouts, dtype):
    values, mask = random_packed(SMALL, SMALL, dtype, "cpu")
    weight = build(values, mask, layouts)
    assert weight.values is values
    assert weight.metadata_shares == (0.0625,)
    assert share(values, mask, layouts) == 0.5625


def test_two_layouts():
    values, mask = random_packed(SMALL, SMALL, torch.bfloat16, "cpu")
    weight = build(values, mask, ("wgmma_sp", "mma_sp"))
    (first,), (second,) = (build(values, mask, (name,)).metadata for name in ("wgmma_sp", "mma_sp"))
    assert torch.equal(weight.metadata[0], first) and torch.equal(weight.metadata[1], second)
    assert share(values, mask, ("wgmma_sp", "mma_sp")) == 0.625


@pytest.mark.parametrize(
    "layouts", [("mma_sp",), ("wgmma_sp", "mma_sp"), ("mask",), ("mma_sp", "mask")], ids=str
)
def test_metadata_takes_the_place_of_the_mask(layouts):
    values, mask = random_packed(SMALL, SMALL, torch.bfloat16, "cpu")
    expected = build(values, mask.clone(), layouts).metadata
    found = build(values, mask, layouts, reuse_mask=True).metadata
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert [one.dtype for one in found] == [one.dtype for one in expected]
    assert mask.data_ptr() in [one.data_ptr() for one in found]


def test_values_and_mask_of_two_weights():
    values, _ = random_packed(64, 128, torch.bfloat16, "cpu")
    _, mask = random_packed(64, 64, torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match="do not belong together"):
        build(values, mask, ("mma_sp",))


def cusparselt_or_skip(dtype: torch.dtype) -> None:
    problem = Problem.on(torch.device("cuda"), N=N, K=K, dtype=dtype)
    if reason := cusparselt.SPEC.supports(problem):
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cusparselt_shares_the_values(dtype):
    cusparselt_or_skip(dtype)
    values, mask = random_packed(N, K, dtype, "cuda")
    weight = build(values, mask, ("wgmma_sp", "cusparselt"))
    assert torch.equal(weight.values, values)
    assert weight.values.data_ptr() == weight.metadata[1].data_ptr()
    assert share(values, mask, ("cusparselt",)) == 0.5625
    assert share(values, mask, ("wgmma_sp", "cusparselt")) == 0.625


def requested_bytes() -> int:
    """Without what the allocator leaves unsplit: up to 1 MiB a block, by what was freed before."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


@pytest.mark.gpu
@pytest.mark.parametrize("layouts", [("mma_sp",), ("mma_sp", "cusparselt")], ids=str)
def test_allocated_bytes(layouts):
    """As the allocator counts, once what was loaded is gone."""
    cusparselt_or_skip(torch.bfloat16)
    values, mask = random_packed(N, K, torch.bfloat16, "cuda")
    build(values, mask, layouts)  # what libraries keep is not the weight's
    before = requested_bytes() - values.nbytes - mask.nbytes
    weight = build(values, mask, layouts)
    del values, mask
    grown = requested_bytes() - before
    assert weight.resident_bytes <= grown <= 0.63 * 2 * N * K
