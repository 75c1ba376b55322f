"""Which layers are sparsified, and that scaling and folding change nothing else."""

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM
from transformers.pytorch_utils import Conv1D

from cast_serve.trainer.config import Pattern
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.layers import (
    ScaledConv1D,
    ScaledLinear,
    add_scales,
    choose_layers,
    optimizer_groups,
    scale_weight,
    scaled_layers,
)

NM = Pattern(kept=2, group=4)
WIDE = Pattern(kept=1, group=4)


def choose(model, *, pattern=NM, scaling_blocks=2):
    return choose_layers(model, pattern, scaling_blocks=scaling_blocks)


def test_scale_weight_against_equation():
    weight, scale = torch.randn(3, 12), torch.randn(3, 2)
    expected = torch.empty_like(weight)
    for r in range(3):
        for c in range(12):
            expected[r, c] = scale[r, c // (12 // 2)] * weight[r, c]
    assert torch.equal(scale_weight(weight, scale, input_dim=1), expected)
    assert torch.equal(scale_weight(weight.t().contiguous(), scale, input_dim=0), expected.t())


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_fold_linear_exactly(blocks):
    layer = ScaledLinear(nn.Linear(32, 16), blocks=blocks)
    nn.init.uniform_(layer.cast_scale, 0.5, 2.0)
    x = torch.randn(5, 32)
    pruned = nn.Linear(32, 16)
    layer.weight.data[:, ::2] = 0
    before = layer(x)
    layer.prune_and_fold_(NM)
    pruned.weight, pruned.bias = layer.weight, layer.bias
    assert torch.equal(pruned(x), before)
    assert torch.equal(layer(x), before)


def test_fold_conv1d_exactly():
    conv = Conv1D(16, 32)
    layer = ScaledConv1D(conv, blocks=2)
    nn.init.uniform_(layer.cast_scale, 0.5, 2.0)
    layer.weight.data[::2] = 0
    x = torch.randn(5, 32)
    before = layer(x)
    layer.prune_and_fold_(NM)
    conv.weight = layer.weight
    assert torch.equal(conv(x), before)


def test_prune_conv1d_groups_run_along_inputs():
    layer = ScaledConv1D(Conv1D(6, 8), blocks=2)
    layer.prune_and_fold_(NM)
    # weight is [in 8, out 6]: two of four consecutive inputs of each output are left.
    assert ((layer.weight.t().reshape(-1, 4) != 0).sum(1) == 2).all()


@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_add_scales_keeps_the_function(model_name, tiny_models):
    model = tiny_models[model_name]().eval()
    ids = torch.arange(20).reshape(2, 10)
    before, names = model(ids).logits, set(model.state_dict())
    add_scales(model, choose(model), scaling_blocks=2)
    assert torch.equal(model(ids).logits, before)
    added = set(model.state_dict()) - names
    assert names <= set(model.state_dict())
    assert added == {f"{name}.cast_scale" for name, _ in scaled_layers(model)}


def test_choose_layers_llama(tiny_models):
    sparse = {
        c.name.rpartition(".")[2]: c for c in choose(tiny_models["llama"]()) if not c.dense_because
    }
    projections = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    assert set(sparse) == set(projections.split())
    assert (sparse["down_proj"].rows, sparse["down_proj"].columns) == (32, 64)


def test_choose_layers_gpt2_transposed(tiny_models):
    choices = {c.name: c for c in choose(tiny_models["gpt2"]())}
    attention = choices["transformer.h.0.attn.c_attn"]
    assert (attention.rows, attention.columns, attention.dense_because) == (96, 32, None)
    assert choices["lm_head"].dense_because == "outside the decoder blocks"


def test_choose_layers_opt_projections_outside_blocks_stay_dense():
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    choices = {c.name: c.dense_because for c in choose(OPTForCausalLM(config))}
    assert choices["model.decoder.project_in"] == "outside the decoder blocks"
    assert choices["model.decoder.layers.1.fc2"] is None
    assert sum(reason is None for reason in choices.values()) == 2 * 6


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "K=36 is not a multiple of 8"),
        ({"pattern": Pattern(kept=1, group=8)}, "K=36 is not a multiple of 8"),
        ({"pattern": WIDE, "scaling_blocks": 8}, "K=36 is not a multiple of scaling_blocks=8"),
        ({"pattern": WIDE}, None),
    ],
)
def test_choose_layers_reasons(options, reason, tiny_models):
    choices = choose(tiny_models["llama"](intermediate_size=36), **options)
    down = next(c for c in choices if c.name == "model.layers.0.mlp.down_proj")
    assert down.dense_because == reason


def test_choose_layers_nothing_to_sparsify(tiny_models):
    with pytest.raises(RunError, match=r"no layer to sparsify.*K=32 is not a multiple of 128"):
        choose(tiny_models["llama"](), pattern=Pattern(kept=1, group=128))


@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_optimizer_groups_hold_every_parameter_once(model_name, tiny_models):
    model = tiny_models[model_name]()
    add_scales(model, choose(model), scaling_blocks=2)
    groups = optimizer_groups(model)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    sparsified = {id(p) for g in groups if g["input_dim"] is not None for p in g["params"]}
    assert sparsified == {id(layer.weight) for _, layer in scaled_layers(model)}
    layouts = {group["input_dim"] for group in groups}
    assert layouts == {0 if model_name == "gpt2" else 1, None}
    parameters = dict(model.named_parameters())
    for group in groups:
        assert [id(parameters[n]) for n in group["param_names"]] == [id(p) for p in group["params"]]
