"""Masks of a weight in either layout, and the diagnostics taken over them."""

import pytest
import torch

from cast_serve.trainer.config import Pattern
from cast_serve.trainer.masks import progress, weight_mask


def test_weight_mask_ties_keep_the_leftmost():
    weight = torch.tensor([[1.0, -1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    expected = [[True, True, False, False, True, True, False, False]]
    assert weight_mask(weight, Pattern(kept=2, group=4), input_dim=1).tolist() == expected


@pytest.mark.parametrize("text", ["1:2", "1:4", "2:4", "3:4", "4:8", "2:16"])
@pytest.mark.parametrize("input_dim", [0, 1])
def test_weight_mask_keeps_n_of_every_m_inputs(text, input_dim):
    pattern = Pattern.parse(text)
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    weight = rows if input_dim == 1 else rows.t().contiguous()
    mask = weight_mask(weight, pattern, input_dim=input_dim)
    assert mask.shape == weight.shape
    by_group = (mask if input_dim == 1 else mask.t()).reshape(-1, pattern.group)
    assert (by_group.sum(1) == pattern.kept).all()
    magnitudes = rows.abs().reshape(-1, pattern.group)
    least_kept = magnitudes.masked_fill(~by_group, torch.inf).amin(1)
    most_masked = magnitudes.masked_fill(by_group, -torch.inf).amax(1)
    assert (least_kept >= most_masked).all()


def test_progress():
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.0], [4.0, 4.0, 1.0, -1.0]])
    mask = weight_mask(weight, Pattern(kept=2, group=4), input_dim=1)
    found = progress([(weight, mask)])
    assert found.sparse_weight_ratio == pytest.approx(13 / 16)
    assert found.masked == pytest.approx(3 / 4)
    assert found.kept == pytest.approx(13 / 4)
