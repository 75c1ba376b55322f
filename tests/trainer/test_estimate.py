"""Estimates of memory and time, against what is known of models and what a small run holds."""

import dataclasses
import json
import re

import pytest
import torch

from cast_serve.trainer import estimate
from cast_serve.trainer.adams.optimizer import AdamS
from cast_serve.trainer.capacity import GPUS, Shape, flops_per_token, memory, speed
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.layers import add_scales, choose_layers, optimizer_groups
from cast_serve.trainer.main import main


def estimated(capsys, *flags: str) -> tuple[int, dict]:
    status = estimate.main(flags)
    return status, json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "parameters"), [("7b", 6.74e9), ("13b", 13.02e9), ("70b", 68.98e9)]
)
def test_llama_2_on_eight_gpus(capsys, name, parameters):
    status, found = estimated(capsys, "--model", f"llama-2-{name}")
    # And the scales, two a row.
    assert found["parameters"] == pytest.approx(parameters, rel=1e-3)
    state = ("fp32 master weights", "fp32 gradients", "AdamS moments")
    assert sum(found["gpu_bytes"][part] for part in state) == pytest.approx(
        16 * found["parameters"] / 8, rel=1e-6
    )
    assert (status, found["fits"]) == ((1, False) if name == "70b" else (0, True))


def test_offloaded_state_is_in_host_memory(capsys):
    status, found = estimated(capsys, "--model", "llama-2-70b", "--offload")
    assert status == 0
    assert "AdamS moments" in found["host_bytes"]
    assert "AdamS moments" not in found["gpu_bytes"]


def test_state_is_what_a_run_holds(make_config, tiny_models):
    config = make_config()
    model = tiny_models["llama"]()
    expected = memory(Shape.of(model, config), config, context=32, processes=1).gpu
    add_scales(model, choose_layers(model, config.nm, scaling_blocks=2), scaling_blocks=2)
    optimizer = AdamS(
        optimizer_groups(model), lr=1e-3, decay=1e-4, total_steps=2, pattern=config.nm
    )
    model(input_ids=torch.zeros(1, 8, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    parameters = list(model.parameters())
    assert expected["fp32 master weights"] == sum(p.nbytes for p in parameters)
    assert expected["fp32 gradients"] == sum(p.grad.nbytes for p in parameters)
    tensors = [
        tensor
        for state in optimizer.state.values()
        for tensor in state.values()
        if torch.is_tensor(tensor)
    ]
    masks = [tensor for tensor in tensors if tensor.dtype == torch.bool]
    assert expected["masks"] == sum(mask.nbytes for mask in masks)
    moments = sum(tensor.nbytes for tensor in tensors) - expected["masks"]
    assert expected["AdamS moments"] == moments


def test_two_shards_are_half_each(make_config, tiny_models):
    one, two = make_config(), make_config(parallel="fsdp")
    shape = Shape.of(tiny_models["llama"](), one)
    whole = memory(shape, one, context=32, processes=2).gpu
    half = memory(shape, two, context=32, processes=2).gpu
    for part in ("fp32 master weights", "AdamS moments", "masks"):
        assert half[part] == whole[part] // 2
    assert half["blocks put together"] > whole["blocks put together"] == 0


def test_what_a_block_keeps_of_a_token(make_config, tiny_models):
    llama, gpt2 = tiny_models["llama"](), tiny_models["gpt2"]()
    h, f = llama.config.hidden_size, llama.config.intermediate_size
    keys = llama.config.num_key_value_heads * llama.config.head_dim
    assert Shape.of(llama, make_config()).kept == 7 * h + 3 * keys + 3 * f
    assert Shape.of(gpt2, make_config()).kept == 18 * gpt2.config.hidden_size


def test_checkpointing_keeps_one_block(make_config, tiny_models):
    config = make_config()
    shape = Shape.of(tiny_models["llama"](num_hidden_layers=6), config)
    part = "activations (rough)"
    whole = memory(shape, config, context=32, processes=1).gpu[part]
    config = make_config(gradient_checkpointing=True)
    spared = memory(shape, config, context=32, processes=1).gpu[part]
    inputs = 6 * shape.hidden
    assert spared / whole == pytest.approx((inputs + shape.kept) / (6 * shape.kept))


def test_where_the_teacher_lives(make_config, tiny_models):
    model = tiny_models["llama"](num_hidden_layers=6)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.model.layers]
    total = sum(p.numel() for p in model.parameters())

    def bytes_of(**changes: object) -> tuple[int, int]:
        config = make_config(compute="bf16", **changes)
        shape = dataclasses.replace(Shape.of(model, config), parameters=total)
        needed = memory(shape, config, context=32, processes=1)
        return needed.gpu["teacher"], needed.host["teacher"]

    assert bytes_of() == (2 * total, 0)
    assert bytes_of(teacher="offload") == (
        2 * (total - sum(blocks) + 2 * blocks[0]),
        2 * sum(blocks),
    )
    assert bytes_of(teacher="cached") == (0, 0)
    assert bytes_of(eta=0.0) == (0, 0)


def test_speed_is_arithmetic_at_the_share_of_the_peak(make_config, tiny_models):
    config = make_config(batch_size=2, gradient_accumulation=3)
    shape = Shape.of(tiny_models["llama"](), config)
    found = speed(shape, config, GPUS["h100"], context=32, processes=1, mfu=0.5)
    assert found.tokens == 2 * 3 * 32
    flops = found.tokens * flops_per_token(shape, config, context=32)
    assert found.arithmetic == pytest.approx(flops / (0.5 * 989e12))
    assert found.traffic == 0


def test_offloading_takes_time_of_the_host(make_config, tiny_models):
    """The optimizer once a step, sums of gradients once a pass but the first."""

    def of(passes: int, **changes):
        config = make_config(parallel="fsdp", gradient_accumulation=passes, **changes)
        shape = Shape.of(tiny_models["llama"](), config)
        return speed(shape, config, GPUS["h100"], context=32, processes=2, mfu=0.5)

    one, three = of(1, offload=True), of(3, offload=True)
    assert of(3).host_sums == one.host_sums == 0
    assert three.host_sums > 0
    assert three.optimizer == one.optimizer > 5 * of(1).optimizer
    waits = three.tokens / three.tokens_per_s - max(three.arithmetic, three.traffic)
    assert waits == pytest.approx(three.host_sums + three.optimizer)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "llama-9"], "no configuration in llama-9.*llama-2-7b"),
        (["--model", "llama-2-7b", "--gpu", "tpu"], "'tpu' is not known; there is a100"),
        (["--model", "llama-2-7b", "--mfu", "2"], "mfu above 0"),
        (["--model", "llama-2-7b", "--context", "4097"], "4097 is more than the model's 4096 pos"),
        (["--model", "llama-2-7b", "--parallel", "ddp", "--offload"], "needs parallel=fsdp"),
    ],
)
def test_refused(flags, message):
    with pytest.raises(RunError, match=message):
        estimate.main(flags)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("t5", ".* makes no causal language model: .*T5Config.*; give a folder .*llama-2-7b"),
        ("none-such", "no configuration in .*none-such.*llama-2-7b"),
    ],
)
def test_refused_model(tmp_path, capsys, model_type, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    # 1 would be: it does not fit.
    assert main(["estimate", "--model", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert re.match(f"cast-train estimate: error: model: {message}", said)
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"hidden_size": "64"},
            "no configuration in .*'hidden_size': TypeError: .*; give a folder",
        ),
        ({"num_attention_heads": 0}, "no configuration in .* by zero; give a folder"),
        ({"hidden_act": "swish2"}, "makes no causal language model: 'swish2'; give a folder"),
    ],
)
def test_refused_config(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    with pytest.raises(RunError, match=message):
        estimate.main(["--model", str(tmp_path)])


def test_model_without_attention(tmp_path, capsys):
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"} | shape))
    assert main(["estimate", "--model", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["gpu_bytes"]["activations (rough)"] > 0
