from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cast_serve.kernels.packing import check_mask, unpack
from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.model_loaders.layers import find_layers
from cast_serve.model_loaders.stream import DenseTensor, PackedLinear, stream

FORMATS = ["packed", "dense", "training", "ct-bitmask", "ct-dense", "plain"]
Q0 = "model.layers.0.self_attn.q_proj"
Make = Callable[[str], Any]


def load(
    path: Path, dtype: torch.dtype | None = None
) -> tuple[dict[str, PackedLinear], dict[str, DenseTensor]]:
    items = list(stream(Checkpoint.open(path), dtype=dtype))
    packed = {item.name: item for item in items if isinstance(item, PackedLinear)}
    dense = {item.name: item for item in items if isinstance(item, DenseTensor)}
    assert len(packed) + len(dense) == len(items)
    return packed, dense


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stored", FORMATS)
def test_stream(make: Make, stored: str, shards: int) -> None:
    folder = make(stored).save(shards=shards)
    packed, dense = load(folder.path)
    assert packed.keys() == folder.expected.keys()
    for name, weight in folder.expected.items():
        assert check_mask(packed[name].bitmask).ok
        assert torch.equal(unpack(packed[name].values, packed[name].bitmask), weight)
        # -0.0 is gone: zeros have no sign bit.
        values = packed[name].values
        assert not torch.signbit(values[values == 0]).any()
    for name, item in dense.items():
        assert torch.equal(item.tensor, folder.tensors[name])
    assert "model.layers.0.self_attn.q_proj.bias" in dense


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_stream_casts(make: Make, stored: str, dtype: torch.dtype) -> None:
    folder = make(stored).save()
    packed, dense = load(folder.path, dtype)
    for name, weight in folder.expected.items():
        assert torch.equal(unpack(packed[name].values, packed[name].bitmask), weight.to(dtype))
    assert {item.tensor.dtype for item in dense.values()} == {dtype}


def test_stream_reads_shape_of_rank_one(make: Make) -> None:
    folder = make("ct-bitmask")
    folder.tensors[Q0 + ".shape"] = folder.tensors[Q0 + ".shape"].flatten()
    packed, _ = load(folder.save().path)
    assert Q0 in packed


def test_stream_reads_compression_config(make: Make) -> None:
    folder = make("ct-bitmask")
    folder.config["compression_config"] = folder.config.pop("quantization_config")
    packed, _ = load(folder.save().path)
    assert packed.keys() == folder.expected.keys()


def test_stream_reads_text_config(make: Make) -> None:
    folder = make("packed")
    folder.config["text_config"] = {"quantization_config": folder.config.pop("quantization_config")}
    packed, _ = load(folder.save().path)
    assert packed.keys() == folder.expected.keys()


@pytest.mark.parametrize(
    ("ignore", "left_dense"),
    [
        pytest.param([Q0], {Q0}, id="name"),
        pytest.param(
            [r"re:model\.layers\.\d+\.self_attn.*"],
            {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qk"},
            id="pattern",
        ),
        # re: patterns match from the start of the name, as compressed-tensors has it.
        pytest.param(["re:self_attn"], set(), id="unanchored"),
        pytest.param(["q_proj"], set(), id="leaf"),
    ],
)
@pytest.mark.parametrize("stored", ["dense", "ct-dense"])
def test_stream_ignore(make: Make, stored: str, ignore: list[str], left_dense: set[str]) -> None:
    folder = make(stored)
    declared = folder.config["quantization_config"]
    if stored == "ct-dense":
        declared["sparsity_config"] = {**declared["sparsity_config"], "ignore": ignore}
    else:
        declared["ignore"] = ignore
    packed, dense = load(folder.save().path)
    assert packed.keys() == folder.expected.keys() - left_dense
    for name in left_dense:
        assert dense[name + ".weight"].linear == name
        assert "ignore" in (dense[name + ".weight"].why_dense or "")


def test_stream_targets(make: Make) -> None:
    folder = make("ct-dense")
    declared = folder.config["quantization_config"]
    declared["sparsity_config"] = {**declared["sparsity_config"], "targets": ["re:.*mlp.*", Q0]}
    packed, dense = load(folder.save().path)
    assert packed.keys() == {name for name in folder.expected if "mlp" in name or name == Q0}
    assert dense["model.layers.1.self_attn.q_proj.weight"].why_dense == "not in targets"


def test_stream_ct_partly_dense(make: Make) -> None:
    """compressed-tensors stored a module that it did not compress as a plain weight."""
    folder = make("ct-bitmask")
    for part in ("compressed", "bitmask", "shape"):
        del folder.tensors[f"{Q0}.{part}"]
    folder.tensors[Q0 + ".weight"] = torch.randn(32, 32)
    packed, dense = load(folder.save().path)
    assert packed.keys() == folder.expected.keys() - {Q0}
    assert dense[Q0 + ".weight"].why_dense == "stored dense"


def test_stream_plain_keeps_dense_what_is_not_2of4(make: Make) -> None:
    folder = make("plain")
    weight = torch.randn(32, 32)
    folder.tensors[Q0 + ".weight"] = weight
    packed, dense = load(folder.save().path)
    assert packed.keys() == folder.expected.keys() - {Q0}
    item = dense[Q0 + ".weight"]
    assert torch.equal(item.tensor, weight)
    assert (item.why_dense or "").startswith("not 2:4: 256 of 256 groups have more than two")


@pytest.mark.parametrize(
    ("name", "tensor", "why"),
    [
        pytest.param("mlp.experts.3.up_proj", torch.randn(8, 8), "MoE expert", id="expert"),
        pytest.param("mlp.gate", torch.randn(8, 8), "MoE router", id="router"),
        pytest.param("mlp.odd", torch.zeros(8, 12), "K=12 is not a multiple of 8", id="K12"),
        pytest.param("mlp.int", torch.zeros(8, 8, dtype=torch.int8), "dtype int8", id="int8"),
    ],
)
def test_stream_plain_why_dense(make: Make, name: str, tensor: torch.Tensor, why: str) -> None:
    folder = make("plain")
    folder.tensors[f"model.layers.0.{name}.weight"] = tensor
    _, dense = load(folder.save().path)
    assert dense[f"model.layers.0.{name}.weight"].why_dense == why


def test_stream_training_without_scales(make: Make) -> None:
    """Weight scaling is optional: then all scales are one."""
    folder = make("training")
    unscaled = {}
    for name in folder.expected:
        scale = folder.tensors.pop(name + ".cast_scale")
        unscaled[name] = folder.expected[name] / scale.repeat_interleave(
            folder.expected[name].shape[1] // scale.shape[1], dim=1
        )
    packed, _ = load(folder.save().path)
    for name, weight in unscaled.items():
        torch.testing.assert_close(unpack(packed[name].values, packed[name].bitmask), weight)


def test_stream_training_masks_the_unscaled_weight(make: Make) -> None:
    """A scale that changes between the blocks of one group must not change what survives."""
    folder = make("training")
    folder.tensors[Q0 + ".weight"][0, :4] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    # n = 16 blocks of two columns: columns 0 and 1 are blown up.
    folder.tensors[Q0 + ".cast_scale"] = torch.ones(32, 16)
    folder.tensors[Q0 + ".cast_scale"][0, 0] = 100.0
    packed, _ = load(folder.save().path)
    row = unpack(packed[Q0].values, packed[Q0].bitmask)[0, :4]
    assert row.tolist() == [0.0, 0.0, 3.0, 4.0]


def test_stream_gpt2_orientation(make: Make) -> None:
    """Conv1D weights are [in, out] on disk, and groups run along the inputs."""
    folder = make("plain")
    folder.config["model_type"] = "gpt2"
    weight = folder.expected["model.layers.0.mlp.up_proj"]
    folder.tensors["transformer.h.0.mlp.c_fc.weight"] = weight.t().contiguous()
    folder.save()
    (entry,) = [
        linear
        for linear in find_layers(Checkpoint.open(folder.path)).linears
        if linear.name == "transformer.h.0.mlp.c_fc"
    ]
    assert entry.transposed and entry.shape == tuple(weight.shape)
    packed, _ = load(folder.path)
    item = packed["transformer.h.0.mlp.c_fc"]
    assert torch.equal(unpack(item.values, item.bitmask), weight)


def test_stream_gpt2_dense_stays_as_stored(make: Make) -> None:
    folder = make("plain")
    folder.config["model_type"] = "gpt2"
    weight = torch.randn(32, 48)
    folder.tensors["transformer.h.0.attn.c_attn.weight"] = weight
    _, dense = load(folder.save().path)
    assert torch.equal(dense["transformer.h.0.attn.c_attn.weight"].tensor, weight)


def test_stream_of_three_in_four_names_group(make: Make) -> None:
    folder = make("dense")
    folder.tensors[Q0 + ".weight"][5, 8:12] = torch.tensor([1.0, 2.0, 0.0, 3.0])
    with pytest.raises(CheckpointError) as raised:
        load(folder.save().path)
    assert str(raised.value) == (
        f"{folder.path / 'model.safetensors'}: {Q0}.weight: 1 of 256 groups have more than two "
        "non-zeros, the first at row 5, columns 8-11: [1, 2, 0, 3]; "
        "prune it to 2:4 or add it to quantization_config.ignore"
    )
