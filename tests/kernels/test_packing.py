import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cast_serve.kernels import packing
from cast_serve.kernels.packing import (
    PatternError,
    check,
    check_mask,
    keeps_two,
    pack,
    unpack,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Where torch leaves memory uninitialised, a wrong answer must not look like a right one.
NAN = float("nan")


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """[N, K] with 0, 1 or 2 non-zeros a group, zeros of both signs, any layout in memory."""
    rows, columns = draw(st.integers(0, 9)), draw(st.integers(0, 6)) * 8
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kept = draw(st.integers(0, 2))
    order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
    # Not below 0.25, so that no value underflows to a zero.
    magnitude = torch.rand(rows, columns // 4, 4, generator=generator) + 0.25
    sign = torch.where(torch.rand(rows, columns // 4, 4, generator=generator) < 0.5, -1.0, 1.0)
    weight = torch.where(order < kept, magnitude * sign, 0.0 * sign).reshape(rows, columns)
    weight = weight.to(dtype)
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided"]))
    if layout == "transposed":
        return weight.t().contiguous().t()
    if layout == "strided":
        return torch.stack((weight, torch.full_like(weight, NAN)), dim=-1)[..., 0]
    return weight


def bits(weight: torch.Tensor) -> torch.Tensor:
    """The stored bits, which tell -0.0 from 0.0 where torch.equal does not."""
    return weight.contiguous().view(torch.int16 if weight.dtype.itemsize == 2 else torch.int32)


@given(weights())
def test_roundtrip(weight: torch.Tensor) -> None:
    values, mask = pack(weight)
    assert values.shape == (weight.shape[0], weight.shape[1] // 2)
    assert mask.shape == (weight.shape[0], weight.shape[1] // 8)
    assert (values.dtype, mask.dtype) == (weight.dtype, torch.uint8)
    assert torch.equal(unpack(values, mask), weight)


@given(weights())
def test_pack_normalises_negative_zero(weight: torch.Tensor) -> None:
    values, mask = pack(weight)
    positive = torch.where(weight == 0, torch.zeros_like(weight), weight)
    assert torch.equal(bits(unpack(values, mask)), bits(positive))


@given(weights())
def test_pack_keeps_two_of_four(weight: torch.Tensor) -> None:
    _, mask = pack(weight)
    kept = np.unpackbits(mask.numpy(), axis=1, bitorder="little")
    assert (kept.reshape(-1, 4).sum(axis=1) == 2).all()
    assert check_mask(mask).ok


@given(weights())
def test_pack_layout(weight: torch.Tensor) -> None:
    """Values and bits are what the little-endian mask of compressed-tensors says, by numpy."""
    values, mask = pack(weight)
    kept = np.unpackbits(mask.numpy(), axis=1, bitorder="little").astype(bool)
    dense = weight.float().numpy()
    assert (dense[~kept] == 0).all()
    assert np.array_equal(dense[kept].reshape(values.shape), values.float().numpy())


@settings(max_examples=25)
@given(weights(), st.integers(1, 64))
def test_pack_in_blocks(weight: torch.Tensor, block: int) -> None:
    whole = pack(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK_ENTRIES", block)
        parts = pack(weight)
        assert torch.equal(unpack(*parts), weight)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_pack_fills_with_leftmost_zeros() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 5.0]])
    values, mask = pack(weight)
    assert values.tolist() == [[0.0, 0.0, 0.0, 5.0]]
    # Columns 0 and 1 of the first group, 0 and 3 of the second.
    assert mask.tolist() == [[0b1001_0011]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [1, 1 << 22], ids=["blocks", "whole"])
def test_pack_refuses_three_of_four(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BLOCK_ENTRIES", block)
    weight = torch.zeros(6, 16, dtype=dtype)
    weight[4, 8:12] = torch.tensor([1.0, 0.0, -2.0, 3.0])
    weight[5, 0:4] = 1.0
    with pytest.raises(PatternError) as raised:
        pack(weight)
    assert str(raised.value) == (
        "2 of 24 groups have more than two non-zeros, "
        "the first at row 4, columns 8-11: [1, 0, -2, 3]"
    )


def test_pack_counts_nan_as_nonzero() -> None:
    weight = torch.zeros(1, 8)
    weight[0, :3] = NAN
    with pytest.raises(PatternError, match=r"row 0, columns 0-3: \[nan, nan, nan, 0\]"):
        pack(weight)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        pytest.param((2, 12), "K=12 is not a multiple of 8", id="K12"),
        pytest.param((8,), r"a 2:4 weight is \[N, K\], got shape \[8\]", id="vector"),
        pytest.param((2, 2, 8), r"got shape \[2, 2, 8\]", id="cube"),
    ],
)
def test_pack_refuses_shape(shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        pack(torch.zeros(shape))


@pytest.mark.parametrize(
    ("values", "mask", "reason"),
    [
        pytest.param((2, 8), (2, 4), "do not belong together", id="K"),
        pytest.param((3, 8), (2, 2), "do not belong together", id="N"),
        pytest.param((8,), (2, 2), "must be matrices", id="vector"),
    ],
)
def test_unpack_refuses_shapes(values: tuple[int, ...], mask: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        unpack(torch.zeros(values), torch.zeros(mask, dtype=torch.uint8))


def test_unpack_refuses_mask_dtype() -> None:
    with pytest.raises(ValueError, match="a bitmask is uint8, got int32"):
        unpack(torch.zeros(2, 8), torch.zeros(2, 2, dtype=torch.int32))


def test_check_counts_and_limits() -> None:
    weight = torch.zeros(4, 16)
    weight[1, 4:8] = 1.0
    weight[3] = 2.0
    report = check(weight, limit=2)
    assert (report.groups, report.faulty, report.ok) == (16, 5, False)
    assert [(offender.row, offender.column) for offender in report.first] == [(1, 4), (3, 0)]


def test_check_takes_any_multiple_of_four() -> None:
    assert check(torch.zeros(2, 12)).groups == 6
    with pytest.raises(ValueError, match="K=10 is not a multiple of 4"):
        check(torch.zeros(2, 10))


@pytest.mark.parametrize("bad", [0b0011_0111, 0b0011_0001, 0b1111_0011, 0b0000_0011])
def test_check_mask_finds_byte(bad: int) -> None:
    mask = torch.full((3, 4), 0b0011_0101, dtype=torch.uint8)
    mask[2, 1] = bad
    report = check_mask(mask)
    assert report.faulty == 1
    first = report.first[0]
    low_nibble_is_fine = (bad & 0xF).bit_count() == 2
    assert (first.row, first.column) == (2, 12 if low_nibble_is_fine else 8)
    assert sum(first.values) != 2


def test_keeps_two_agrees_with_check_mask() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8)[:, None]
    expected = [check_mask(row[None]).ok for row in every_byte]
    assert keeps_two(every_byte).flatten().tolist() == expected
    assert sum(expected) == 36
