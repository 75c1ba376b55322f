"""The rule of each baseline on one layer, against the rule written out step by step."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cast_serve.kernels.pattern import nm_mask
from cast_serve.trainer.config import Pattern
from cast_serve.trainer.layers import ScaledLayer
from cast_serve.trainer.methods.adamw import MaskedAdamW
from cast_serve.trainer.methods.layers import MaskedConv1D, MaskedLayer, MaskedLinear

NM = Pattern(kept=2, group=4)
LR, BETAS, EPS, LAMBDA = 3e-2, (0.9, 0.95), 1e-8, 0.5
STEPS = 10


class Adam:
    """Adam with bias correction on one tensor, written out."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.mu, self.nu, self.t = torch.zeros_like(weight), torch.zeros_like(weight), 0

    def update(self, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        self.t += 1
        self.mu = BETAS[0] * self.mu + (1 - BETAS[0]) * gradient
        self.nu = BETAS[1] * self.nu + (1 - BETAS[1]) * gradient**2
        mean, square = self.mu / (1 - BETAS[0] ** self.t), self.nu / (1 - BETAS[1] ** self.t)
        return weight - LR * mean / (square.sqrt() + EPS)


def mask_of(weight: torch.Tensor) -> torch.Tensor:
    return nm_mask(weight, kept=2, group=4)


def masked(layer: nn.Module, *, straight_through: bool, learn_scale: bool = False) -> MaskedLayer:
    kind = MaskedConv1D if isinstance(layer, Conv1D) else MaskedLinear
    return kind(
        layer,
        blocks=2,
        pattern=NM,
        straight_through=straight_through,
        learn_scale=learn_scale,
    )


def adamw(layer: nn.Module, **options: object) -> MaskedAdamW:
    return MaskedAdamW(nn.Sequential(layer), lr=LR, betas=BETAS, eps=EPS, **options)


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight [6, 8], inputs and targets of a regression for each step, fp64."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return 0.1 * draw(6, 8), draw(STEPS, 16, 8), draw(STEPS, 16, 6)


def train(
    layer: MaskedLayer, optimizer: MaskedAdamW, inputs: torch.Tensor, targets: torch.Tensor
) -> None:
    for x, y in zip(inputs, targets, strict=True):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()


def gradient_at(weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """dL/dW of mean((x W^T - y)^2) at `weight`."""
    return 2 * (x @ weight.t() - y).t() @ x / y.numel()


def linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(8, 6, bias=False).double()
    layer.weight.data.copy_(weight)
    return layer


def conv1d(weight: torch.Tensor) -> Conv1D:
    layer = Conv1D(6, 8).double()
    layer.weight.data.copy_(weight.t())
    layer.bias.requires_grad_(False)
    return layer


def as_linear(layer: ScaledLayer) -> torch.Tensor:
    """[N, K] of either layout."""
    weight = layer.weight.detach()
    return weight if layer.input_dim == 1 else weight.t()


@pytest.mark.parametrize("make", [linear, conv1d])
@pytest.mark.parametrize(
    ("ramp", "interval"), [(0, 1), (5, 3)], ids=["sr-ste", "ast: annealed, mask for 3 steps"]
)
def test_straight_through_against_rule(problem, make, ramp, interval):
    weight, inputs, targets = problem
    layer = masked(make(weight), straight_through=True)
    optimizer = adamw(layer, decay=LAMBDA, ramp_steps=ramp, mask_interval=interval)
    train(layer, optimizer, inputs, targets)

    expected, adam, masks = weight.clone(), Adam(weight), []
    for t, (x, y) in enumerate(zip(inputs, targets, strict=True), start=1):
        if (t - 1) % interval == 0:
            masks.append(mask_of(expected))
        strength = LAMBDA * min(1, t / ramp) if ramp else LAMBDA
        gradient = gradient_at(masks[-1] * expected, x, y)
        expected = adam.update(expected, gradient + strength * ~masks[-1] * expected)
    torch.testing.assert_close(as_linear(layer), expected)
    # Otherwise a mask that is never refreshed would pass as well.
    assert any(not torch.equal(mask, masks[0]) for mask in masks)


@pytest.mark.parametrize("make", [linear, conv1d])
def test_fixed_mask_against_rule(problem, make):
    weight, inputs, targets = problem
    mask = mask_of(weight)
    layer = masked(make(weight * mask), straight_through=False)
    train(layer, adamw(layer), inputs, targets)

    expected, adam = weight * mask, Adam(weight)
    for x, y in zip(inputs, targets, strict=True):
        expected = adam.update(expected, gradient_at(expected, x, y) * mask)
    torch.testing.assert_close(as_linear(layer), expected)
    assert torch.equal(as_linear(layer) != 0, mask)


def test_dense_is_adam(problem):
    weight, inputs, targets = problem
    layer = linear(weight)
    optimizer = adamw(layer)
    train(layer, optimizer, inputs, targets)
    expected, adam = weight.clone(), Adam(weight)
    for x, y in zip(inputs, targets, strict=True):
        expected = adam.update(expected, gradient_at(expected, x, y))
    torch.testing.assert_close(layer.weight.detach(), expected)
    assert list(optimizer.masked_weights()) == []


def test_refined_term_is_of_pruned_weights_alone(problem):
    weight, inputs, targets = problem
    layer = masked(linear(weight), straight_through=True)
    (layer(inputs[0]) - targets[0]).square().mean().backward()
    plain = layer.weight.grad.clone()
    assert (plain[~layer.mask] != 0).all(), "the gradient goes straight through"
    adamw(layer, decay=LAMBDA).step()
    mask = mask_of(weight)
    assert torch.equal(layer.weight.grad[mask], plain[mask])
    torch.testing.assert_close(
        (layer.weight.grad - plain)[~mask], LAMBDA * weight[~mask], rtol=1e-12, atol=0
    )


def test_learned_scale_of_a_masked_layer(problem):
    weight, inputs, _ = problem
    layer = masked(linear(weight), straight_through=True, learn_scale=True)
    layer.cast_scale.data.uniform_(0.5, 2)
    scales = layer.cast_scale.detach().repeat_interleave(4, dim=1)
    torch.testing.assert_close(
        layer(inputs[0]), inputs[0] @ (scales * mask_of(weight) * weight).t()
    )
    layer(inputs[0]).square().sum().backward()
    assert layer.cast_scale.grad is not None


def test_prune_uses_the_mask_of_the_weight_as_it_is(problem):
    weight, _, _ = problem
    layer = masked(linear(weight), straight_through=True)
    layer.weight.data.copy_(weight.flip(1))
    layer.prune_and_fold_(NM)
    assert torch.equal(layer.weight, weight.flip(1) * mask_of(weight.flip(1)))


def test_state_dict_continues_exactly(problem):
    weight, inputs, targets = problem
    options = {"decay": LAMBDA, "ramp_steps": 5, "mask_interval": 4}
    straight = masked(linear(weight), straight_through=True)
    optimizer = adamw(straight, **options)
    # 6 steps: the mask is that of step 4, which the weight alone no longer tells.
    train(straight, optimizer, inputs[:6], targets[:6])
    assert not torch.equal(straight.mask, mask_of(straight.weight))
    resumed = masked(linear(straight.weight.detach()), straight_through=True)
    other = adamw(resumed, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(resumed.mask, straight.mask)
    train(straight, optimizer, inputs[6:], targets[6:])
    train(resumed, other, inputs[6:], targets[6:])
    assert torch.equal(straight.weight, resumed.weight)
    assert torch.equal(straight.mask, resumed.mask)
    assert optimizer.flips == other.flips
    assert optimizer.flips is not None


def test_flips_counts_changed_entries():
    layer = masked(nn.Linear(4, 1, bias=False), straight_through=True)
    optimizer = adamw(layer, mask_interval=1)
    layer.mask.copy_(torch.tensor([[True, True, False, False]]))
    layer.weight.data.copy_(torch.tensor([[1.0, 8.0, 9.0, 1.0]]))
    layer.weight.grad = torch.zeros(1, 4)
    assert optimizer.flips is None
    optimizer.step()
    assert optimizer.flips == 0.5
