"""One-shot pruning: the pattern, what each method keeps, and by what output error."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from cast_serve.kernels.pattern import nm_mask
from cast_serve.trainer.config import Pattern
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.oneshot.prune import METHODS, prune_oneshot
from cast_serve.trainer.oneshot.sparsegpt import prune_sparsegpt_
from cast_serve.trainer.oneshot.wanda import prune_wanda_

TWO_OF_FOUR = Pattern.parse("2:4")
PATTERNS = [Pattern.parse(text) for text in ("2:4", "1:4", "4:8", "1:2", "3:4")]


@pytest.fixture(scope="module")
def ids():
    return torch.randint(257, (10, 24), generator=torch.Generator().manual_seed(5)).int()


def pruned(model, method, pattern, ids):
    choices = prune_oneshot(model, method, pattern, ids)
    return {c.name: model.get_submodule(c.name) for c in choices if c.dense_because is None}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_exact_pattern_and_all_else_untouched(tiny_models, ids, method, pattern, name):
    model, dense = tiny_models[name](), tiny_models[name]()
    layers = pruned(model, method, pattern, ids)
    assert len(layers) == {"llama": 14, "gpt2": 8}[name]
    for layer in layers.values():
        weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        kept = (weight.reshape(-1, pattern.group) != 0).sum(1)
        assert (kept == pattern.kept).all()
    before = dense.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]) != (key.removesuffix(".weight") in layers)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_deterministic(tiny_models, ids, method):
    first, second = tiny_models["gpt2"](), tiny_models["gpt2"]()
    for model in (first, second):
        prune_oneshot(model, method, TWO_OF_FOUR, ids)
    second = second.state_dict()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.state_dict().items())


def correlated(rows, columns, tokens, *, seed):
    """weight [rows, columns] and inputs [tokens, columns], of unlike scales that hang together."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    scales = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    x = torch.randn(tokens, columns, generator=generator) @ mixing / columns**0.5 * scales
    return torch.randn(rows, columns, generator=generator), x


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_more_knowledge_is_less_output_error(pattern, seed):
    # 200 columns: SparseGPT's blocks of 128 do not divide them.
    weight, x = correlated(32, 200, 1000, seed=seed)
    magnitude, wanda, sparsegpt = weight.clone(), weight.clone(), weight.clone()
    magnitude.masked_fill_(~nm_mask(weight, kept=pattern.kept, group=pattern.group), 0)
    prune_wanda_(wanda, x.norm(dim=0), pattern)
    prune_sparsegpt_(sparsegpt, x.t() @ x, pattern)
    errors = [(x @ (w - weight).t()).norm().item() for w in (sparsegpt, wanda, magnitude)]
    assert errors == sorted(errors)
    assert errors[0] < 0.9 * errors[1]


def test_wanda_keeps_the_largest_products():
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    prune_wanda_(weight, torch.tensor([1.0, 1.0, 3.0, 5.0]), TWO_OF_FOUR)
    assert weight.tolist() == [[0.0, 0.0, 2.0, 1.0], [0.0, 0.0, 1.0, 1.0]]


def sparsegpt_slowly(weight, hessian, pattern):
    """Optimal brain surgeon row by row in fp64, with the inverse of what is left at each column."""
    columns, weight = len(hessian), weight.double().clone()
    hessian = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(columns)
    inverses = [torch.linalg.inv(hessian[c:, c:]) for c in range(columns)]
    for row in weight:
        for c in range(columns):
            if c % pattern.group == 0:
                places = range(c, c + pattern.group)
                loss = {i: row[i].item() ** 2 / inverses[i][0, 0].item() for i in places}
                gone = sorted(places, key=loss.get)[: pattern.group - pattern.kept]
            if c in gone:
                row[c:] -= row[c].item() / inverses[c][0, 0] * inverses[c][0]
                row[c] = 0
    return weight


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 20])
def test_sparsegpt_is_optimal_brain_surgery(pattern, groups):
    weight, x = correlated(6, pattern.group * groups, 300, seed=groups)
    hessian = x.t() @ x
    expected = sparsegpt_slowly(weight, hessian, pattern)
    prune_sparsegpt_(weight, hessian, pattern)
    assert torch.equal(weight == 0, expected == 0)
    torch.testing.assert_close(weight, expected.float(), rtol=1e-3, atol=1e-4)


def test_sparsegpt_last_group_is_the_least_squares_optimum_of_its_mask():
    """Where the pruned columns come first, what survives is their exact replacement."""
    weight, x = correlated(1, 4, 500, seed=0)
    weight[0] = torch.tensor([1e-3, 1e-3, 5.0, 5.0])
    target = x @ weight.t()
    prune_sparsegpt_(weight, x.t() @ x, TWO_OF_FOUR, damping=1e-7)
    assert (weight[0, :2] == 0).all()
    best = torch.linalg.lstsq(x[:, 2:].double(), target.double()).solution.flatten()
    torch.testing.assert_close(weight[0, 2:].double(), best, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_sparsegpt_does_not_see_the_scale_of_the_inputs(seed, scale):
    weight, x = correlated(4, 16, 64, seed=seed)
    other = weight.clone()
    prune_sparsegpt_(weight, x.t() @ x, TWO_OF_FOUR)
    prune_sparsegpt_(other, (x * scale).t() @ (x * scale), TWO_OF_FOUR)
    torch.testing.assert_close(weight, other, rtol=1e-2, atol=1e-3)


def test_sparsegpt_inputs_that_are_always_zero():
    weight, x = correlated(8, 16, 64, seed=1)
    x[:, [0, 5, 6, 7]] = 0
    prune_sparsegpt_(weight, x.t() @ x, TWO_OF_FOUR)
    assert weight.isfinite().all()
    assert (weight[:, [0, 5, 6, 7]] == 0).all()
    assert (weight[:, 1:4] != 0).sum(1).eq(2).all()


@pytest.mark.parametrize("method", METHODS)
def test_conv1d_is_a_transposed_linear(tiny_models, ids, method):
    stock = tiny_models["gpt2"]()
    linear = copy.deepcopy(stock)
    for name, layer in list(linear.named_modules()):
        if isinstance(layer, Conv1D):
            columns, rows = layer.weight.shape
            twin = nn.Linear(columns, rows)
            twin.weight.data, twin.bias.data = layer.weight.data.t().contiguous(), layer.bias.data
            linear.set_submodule(name, twin)
    expected = pruned(linear, method, TWO_OF_FOUR, ids)
    for name, layer in pruned(stock, method, TWO_OF_FOUR, ids).items():
        torch.testing.assert_close(layer.weight.t(), expected[name].weight)


def test_wanda_sees_the_outputs_of_pruned_blocks(tiny_models, ids):
    dense, model = tiny_models["llama"]().eval(), tiny_models["llama"]().eval()
    layers = pruned(model, "wanda", TWO_OF_FOUR, ids)
    half = copy.deepcopy(dense)
    half.model.layers[0].load_state_dict(model.model.layers[0].state_dict())
    masks = {}
    for way, source in (("pruned", half), ("dense", dense)):
        for name in ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
            layer, seen = source.get_submodule(name), []
            handle = layer.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
            with torch.no_grad():
                source(input_ids=ids.long())
            handle.remove()
            masks[way, name] = nm_mask(layer.weight * seen[0].flatten(0, 1).norm(dim=0))
    for (way, name), mask in masks.items():
        assert torch.equal(layers[name].weight != 0, mask) == (way == "pruned"), name


def test_progress_counts_blocks(tiny_models, ids):
    seen = []
    prune_oneshot(
        tiny_models["llama"](), "wanda", TWO_OF_FOUR, ids, progress=lambda *at: seen.append(at)
    )
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("wanda", "method: wanda needs calibration text"),
        ("obs", "method: 'obs' is not possible; use magnitude, wanda, sparsegpt"),
    ],
)
def test_refusals(tiny_models, method, message):
    with pytest.raises(RunError, match=message):
        prune_oneshot(tiny_models["llama"](), method, TWO_OF_FOUR)


def test_inputs_that_are_not_finite(tiny_models, ids):
    model = tiny_models["llama"]()
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = float("inf")
    with pytest.raises(
        RunError, match=r"model.layers.0.self_attn.q_proj: its inputs .* not finite"
    ):
        prune_oneshot(model, "sparsegpt", TWO_OF_FOUR, ids)
