import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cast_serve.kernels.pattern import nm_mask

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 5),
    groups=st.integers(0, 5),
    pattern=st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 4), (4, 8)]),
    dtype=st.sampled_from(DTYPES),
)
def test_nm_mask(
    seed: int, rows: int, groups: int, pattern: tuple[int, int], dtype: torch.dtype
) -> None:
    kept, group = pattern
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values, so that groups are full of ties.
    weight = torch.randint(-3, 4, (rows, groups * group), generator=generator).to(dtype)
    mask = nm_mask(weight, kept=kept, group=group)
    assert mask.shape == weight.shape and mask.dtype == torch.bool
    for entries, chosen in zip(
        weight.reshape(-1, group).tolist(), mask.reshape(-1, group).tolist(), strict=True
    ):
        # Of equals the leftmost: sorted() is stable, and this is plain Python.
        order = sorted(range(group), key=lambda column: -abs(entries[column]))
        assert [column for column in range(group) if chosen[column]] == sorted(order[:kept])


def test_nm_mask_ties() -> None:
    weight = torch.tensor([[1.0, -1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    assert nm_mask(weight).tolist() == [[True, True, False, False] * 2]


def test_nm_mask_keeps_two_where_values_are_not_finite() -> None:
    nan, inf = float("nan"), float("inf")
    weight = torch.tensor([[1.0, nan, 2.0, -nan, -inf, 3.0, inf, nan, nan, nan, nan, nan]])
    kept = [[False, True, False, True], [True, False, False, True], [True, True, False, False]]
    assert nm_mask(weight).reshape(-1, 4).tolist() == kept


def test_nm_mask_ignores_gradient() -> None:
    weight = torch.randn(2, 8, requires_grad=True)
    assert not nm_mask(weight).requires_grad


@pytest.mark.parametrize(("kept", "group"), [(0, 4), (4, 4), (5, 4)])
def test_nm_mask_refuses_pattern(kept: int, group: int) -> None:
    with pytest.raises(ValueError, match=f"{kept}:{group} is not a pattern: needs 0 < N < M"):
        nm_mask(torch.zeros(4, 8), kept=kept, group=group)


@pytest.mark.parametrize("shape", [(8,), (2, 6), (2, 2, 8)])
def test_nm_mask_refuses_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="2:4 needs a matrix whose columns are a multiple of 4"):
        nm_mask(torch.zeros(shape))
