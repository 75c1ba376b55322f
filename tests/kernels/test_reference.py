import pytest
import torch

from cast_serve.kernels.packing import pack
from cast_serve.kernels.pattern import nm_mask
from cast_serve.kernels.reference import spmm_ref

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# q_proj of Llama-3.2-1B is 2048 x 2048; CPU tests take a part of it.
N, K = 96, 512


def sparse_weight(dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    return (weight * nm_mask(weight)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (63,), (), (2, 5)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_spmm_ref(dtype: torch.dtype, shape: tuple[int, ...], with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = sparse_weight(dtype)
    x = torch.randn(*shape, K, generator=generator).to(dtype)
    bias = torch.randn(N, generator=generator).to(dtype) if with_bias else None
    exact = x.double() @ weight.double().t() + (bias.double() if bias is not None else 0)
    y = spmm_ref(x, *pack(weight), bias)
    assert y.shape == (*shape, N) and y.dtype == dtype
    # One rounding to dtype, plus the fp32 sums: K * eps relative to sum |x w|.
    bound = torch.finfo(dtype).eps * exact.abs() + (
        K * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().t() + 1)
    )
    assert ((y.double() - exact).abs() <= bound).all()


def test_spmm_ref_refuses_x() -> None:
    values, mask = pack(sparse_weight(torch.float32))
    with pytest.raises(ValueError, match=r"x \[4, 8\] does not fit W \[96, 512\]"):
        spmm_ref(torch.zeros(4, 8), values, mask)


def test_spmm_ref_refuses_bias() -> None:
    values, mask = pack(sparse_weight(torch.float32))
    with pytest.raises(ValueError, match=r"bias \[8\] does not fit W \[96, 512\]"):
        spmm_ref(torch.zeros(4, K), values, mask, torch.zeros(8))
