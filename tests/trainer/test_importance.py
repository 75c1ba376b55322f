"""Masks by |w| * ||x||: the norms, who uses them, and a run from start to end."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from cast_serve.kernels.pattern import nm_mask
from cast_serve.trainer import importance, refresh
from cast_serve.trainer.adams.optimizer import AdamS
from cast_serve.trainer.adams.rule import Reference
from cast_serve.trainer.config import Pattern
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.gradient import Gradient
from cast_serve.trainer.importance import kept_or_measured, measure, set_importance
from cast_serve.trainer.layers import ScaledConv1D, ScaledLinear, add_scales, choose_layers
from cast_serve.trainer.methods.adamw import MaskedAdamW
from cast_serve.trainer.methods.layers import MaskedConv1D, MaskedLinear
from cast_serve.trainer.preview import pruned
from cast_serve.trainer.run_dir import IMPORTANCE
from cast_serve.trainer.train import run

TWO_OF_FOUR = Pattern(kept=2, group=4)
QUIET = Console(quiet=True)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_norms_are_those_of_the_inputs(tiny_models, kind):
    model = tiny_models[kind]().eval()
    ids = torch.randint(257, (11, 16))
    choices = choose_layers(model, TWO_OF_FOUR, scaling_blocks=1)
    found = measure(model, choices, ids)
    assert set(found) == {choice.name for choice in choices if choice.dense_because is None}
    seen = {}
    for name in found:
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]}))
    with torch.no_grad():
        model(input_ids=ids)
    for name, norm in found.items():
        expected = seen[name].flatten(0, -2).square().mean(0).sqrt()
        torch.testing.assert_close(norm, expected)


def scaled(transposed: bool) -> tuple[ScaledLinear | ScaledConv1D, torch.Tensor, torch.Tensor]:
    """A layer of 6 x 8, norms of its inputs, and the mask [6, 8] that they make."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 8, generator=generator)
    norms = torch.rand(8, generator=generator) * 10
    layer: nn.Linear | Conv1D = Conv1D(6, 8) if transposed else nn.Linear(8, 6, bias=False)
    layer.weight.data = (rows.t() if transposed else rows).contiguous()
    kind = ScaledConv1D if transposed else ScaledLinear
    mask = nm_mask(rows * norms, kept=2, group=4)
    assert not torch.equal(mask, nm_mask(rows, kept=2, group=4))
    return kind(layer, blocks=2), norms, mask.t() if transposed else mask


@pytest.mark.parametrize("transposed", [False, True])
def test_layer_is_pruned_by_them(transposed):
    layer, norms, mask = scaled(transposed)
    layer.set_importance(norms)
    before = layer.weight.detach().clone()
    with pruned(nn.Sequential(layer), TWO_OF_FOUR):
        torch.testing.assert_close(layer.weight.detach(), before * mask)
    torch.testing.assert_close(layer.weight.detach(), before, rtol=0, atol=0)
    assert "importance" not in layer.state_dict()


@pytest.mark.parametrize("transposed", [False, True])
def test_optimizer_masks_by_them(transposed):
    layer, norms, mask = scaled(transposed)
    layer.set_importance(norms)
    optimizer = AdamS(
        [{"params": [layer.weight], "input_dim": layer.input_dim}],
        lr=1e-3,
        decay=1e-4,
        total_steps=10,
        pattern=TWO_OF_FOUR,
        importance={layer.weight: layer.importance},
    )
    for one in (optimizer, copy.deepcopy(optimizer)):
        (weight,) = one.param_groups[0]["params"]
        weight.grad = torch.zeros_like(weight)
        one.step()
        ((_, found),) = one.masked_weights()
        assert torch.equal(found, mask)


def test_optimizer_weighs_few_weights_at_once(monkeypatch):
    """A product with the norms is as large as its weight."""
    layers = [scaled(False)[0] for _ in range(3)]
    weights = [layer.weight for layer in layers]
    norms = torch.linspace(0.1, 2, weights[0].shape[1])[None]
    optimizer = AdamS(
        [{"params": weights, "input_dim": 1}],
        lr=1e-3,
        decay=1e-4,
        total_steps=10,
        pattern=TWO_OF_FOUR,
        importance=dict.fromkeys(weights, norms),
    )
    computed, sizes = Reference.refresh, []

    def counted(self, weights, masks, pattern, *, input_dim):
        sizes.append(len(weights))
        return computed(self, weights, masks, pattern, input_dim=input_dim)

    monkeypatch.setattr(Reference, "refresh", counted)
    monkeypatch.setattr(refresh, "RANKED_AT_ONCE", 2 * weights[0].numel())
    expected = [nm_mask(weight.detach() * norms, kept=2, group=4) for weight in weights]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert sizes == [2, 1]
    for (_, found), mask in zip(optimizer.masked_weights(), expected, strict=True):
        assert torch.equal(found, mask)


@pytest.mark.parametrize("transposed", [False, True])
def test_masked_layer_and_its_optimizer_have_them(transposed):
    scaled_form, norms, mask = scaled(transposed)
    kind, shape = (MaskedConv1D, (6, 8)) if transposed else (MaskedLinear, (8, 6))
    plain = Conv1D(*shape) if transposed else nn.Linear(*shape, bias=False)
    plain.weight.data = scaled_form.weight.detach().clone()
    layer = kind(plain, blocks=2, pattern=TWO_OF_FOUR, straight_through=True, learn_scale=False)
    layer.set_importance(norms)
    assert torch.equal(layer.mask, mask)
    assert torch.equal(layer.scaled_weight() != 0, mask)

    optimizer = MaskedAdamW(nn.Sequential(layer), lr=0.1, mask_interval=1)
    layer.weight.grad = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    weight = layer.weight.detach().t() if transposed else layer.weight.detach()
    found = layer.mask.t() if transposed else layer.mask
    assert torch.equal(found, nm_mask(weight * norms, kept=2, group=4))
    assert not torch.equal(layer.mask, mask), "the step has moved none"


@pytest.mark.parametrize("method", ["cast", "ast", "sr-ste"])
def test_a_run_ends_with_their_masks(make_config, method):
    form = "training" if method == "cast" else "dense"
    config = make_config(
        method=method, mask_metric="activation", allow_short_travel=True, export=form
    )
    run(config, QUIET)
    norms = load_file(config.run_dir / IMPORTANCE)
    weights = load_file(config.output / "model.safetensors")
    differ = 0
    for name, norm in norms.items():
        weight = weights[f"{name}.weight"]
        survives = weight != 0
        assert survives.unflatten(1, (-1, 4)).sum(-1).eq(2).all(), name
        # The survivors are the largest of their groups by |w| ||x||; the others are zero by now.
        assert torch.equal(survives, nm_mask(weight * norm, kept=2, group=4)), name
        differ += int((survives != plain_mask(config, name)).sum())
    assert differ > 0
    assert json.loads((config.output / "cast.json").read_text())["mask_metric"] == "activation"


def plain_mask(config, name):
    """That of a run by |w| alone, whose start is the same."""
    folder = config.output.with_name("plain")
    if not folder.exists():
        run(replace(config, mask_metric="magnitude", output=folder), QUIET)
    weight = load_file(folder / "model.safetensors")[f"{name}.weight"]
    return nm_mask(weight, kept=2, group=4)


@pytest.mark.parametrize("method", ["cast", "ast"])
def test_a_resumed_run_has_the_same(make_config, monkeypatch, method):
    changes = {"mask_metric": "activation", "allow_short_travel": True, "save_steps": 4}
    changes |= {"method": method, "export": "training" if method == "cast" else "dense"}
    config = make_config(**changes)
    run(replace(config, output=config.output.with_name("straight")), QUIET)
    compute, calls = Gradient.accumulate, []

    def interrupted(self, *arguments, **options):
        calls.append(None)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return compute(self, *arguments, **options)

    monkeypatch.setattr(Gradient, "accumulate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config, QUIET)
    kept = (config.run_dir / IMPORTANCE).stat().st_mtime_ns
    run(replace(config, resume=True), QUIET)
    assert (config.run_dir / IMPORTANCE).stat().st_mtime_ns == kept
    straight, resumed = (
        load_file(folder / "model.safetensors")
        for folder in (config.output.with_name("straight"), config.output)
    )
    assert all(torch.equal(resumed[name], weight) for name, weight in straight.items())


def test_a_start_that_was_cut_off_is_no_run(make_config):
    config = make_config(mask_metric="activation", allow_short_travel=True, steps=1)
    config.run_dir.mkdir()
    (config.run_dir / IMPORTANCE).write_bytes(b"half of it")
    run(config, QUIET)
    assert load_file(config.run_dir / IMPORTANCE)


def test_damaged_norms_are_refused(make_config):
    config = make_config(mask_metric="activation", allow_short_travel=True, steps=1)
    run(config, QUIET)
    norms = config.run_dir / IMPORTANCE
    before = norms.read_bytes()
    norms.write_bytes(b"ab")
    message = rf"resume: {norms} is damaged: .*; remove it, it is measured again"
    with pytest.raises(RunError, match=message):
        run(replace(config, resume=True), QUIET)
    norms.unlink()
    run(replace(config, resume=True), QUIET)
    assert norms.read_bytes() == before


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")]
)
def test_norms_without_room(make_config, monkeypatch, error):
    config = make_config(mask_metric="activation", allow_short_travel=True, steps=1)

    def fail(tensors, path):
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(importance, "save_file", fail)
        message = f"output: cannot write {config.run_dir}: No space left on device"
        with pytest.raises(RunError, match=message):
            run(config, QUIET)
    assert not (config.run_dir / IMPORTANCE).exists()
    run(config, QUIET)
    assert load_file(config.run_dir / IMPORTANCE)


def test_norms_where_nothing_can_be_written(tiny_models, tmp_path):
    (tmp_path / "file").touch()
    model = tiny_models["llama"]()
    choices = choose_layers(model, TWO_OF_FOUR, scaling_blocks=1)
    stream = [{"input_ids": torch.arange(8)}]
    run_dir = tmp_path / "file" / "out.run"
    with pytest.raises(RunError, match=f"output: cannot write {run_dir}: Not a directory"):
        kept_or_measured(run_dir, model, choices, stream, resumed=False)


def test_no_logits_are_made(tiny_models):
    model = tiny_models["llama"]()

    def never(*_):
        raise AssertionError("the head was asked")

    model.lm_head.register_forward_pre_hook(never)
    choices = choose_layers(model, Pattern.parse("2:4"), scaling_blocks=1)
    assert len(measure(model, choices, torch.zeros(1, 8, dtype=torch.long))) == 14


def test_inputs_that_are_not_finite(tiny_models):
    model = tiny_models["llama"]()
    model.model.embed_tokens.weight.data.fill_(float("nan"))
    choices = choose_layers(model, TWO_OF_FOUR, scaling_blocks=1)
    with pytest.raises(RunError, match=r"q_proj: its inputs on the calibration text are not"):
        measure(model, choices, torch.zeros(1, 8, dtype=torch.long))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "fixed-mask", "lambda_": None, "export": "dense"},
            "mask_metric: is of method cast, sr-ste, ast, not fixed-mask; leave it out",
        ),
        ({"parallel": "fsdp"}, "mask_metric: activation runs the whole dense model"),
    ],
)
def test_where_they_cannot_be_had(make_config, changes, message):
    with pytest.raises(RunError, match=message):
        make_config(mask_metric="activation", **changes)


def test_importance_follows_the_layer(tiny_models):
    model = tiny_models["llama"]()
    choices = choose_layers(model, TWO_OF_FOUR, scaling_blocks=2)
    norms = measure(model, choices, torch.randint(257, (2, 8)))
    add_scales(model, choices, scaling_blocks=2)
    set_importance(model, norms)
    model.to(torch.float64)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.importance.dtype == torch.float64
    assert layer.importance.shape == (1, layer.weight.shape[1])
