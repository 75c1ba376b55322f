"""8-bit forms: the rule to half a step, the pattern exactly, and damage named by tensor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cast_serve.cli.model import app
from cast_serve.kernels.packing import unpack
from cast_serve.model_loaders.check import check
from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.model_loaders.convert import convert
from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.model_loaders.quantize import quantize
from cast_serve.model_loaders.rounding import SMALLEST_SCALE, dequantize_rows, quantize_rows
from cast_serve.model_loaders.stream import PackedLinear, stream
from cast_serve.model_loaders.summary import summarise

FP8, INT8 = torch.float8_e4m3fn, torch.int8
DTYPES = {"fp8": FP8, "int8": INT8}
FORMATS = ["packed", "dense", "training", "ct-bitmask", "ct-dense", "plain"]
Q0 = "model.layers.0.self_attn.q_proj"
Make = Callable[[str], Any]


def half_step(scaled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance of neighbours of `dtype` around `scaled` = w / scale."""
    if dtype == INT8:
        return torch.full_like(scaled, 0.5)
    # 3 bits behind the point; below 2^-6 numbers are subnormal and evenly spaced.
    exponent = scaled.abs().clamp(min=2.0**-6).log2().floor()
    return 2.0 ** (exponent - 4)


@pytest.mark.parametrize("dtype", [FP8, INT8], ids=["fp8", "int8"])
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-90, 90))
def test_error_is_at_most_half_a_step(dtype: torch.dtype, seed: int, exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Log-normal: rows with outliers, whose small weights fall into subnormals.
    values = torch.randn(7, 24, generator=generator)
    values = values * (2 * torch.randn(7, 24, generator=generator)).exp() * 2.0**exponent
    rounded, scale = quantize_rows(values, dtype)
    assert (rounded.dtype, scale.dtype, scale.shape) == (dtype, torch.float32, (7, 1))
    scaled = values.double() / scale.double()
    error = (rounded.double() - scaled).abs()
    # 2^-22: the division is itself rounded to fp32 before it is rounded to 8 bits.
    assert (error <= half_step(scaled, dtype) + scaled.abs() * 2.0**-22).all()
    largest = 448 if dtype == FP8 else 127
    assert (rounded.float().abs().amax(dim=1) == largest).all()


def test_rounding_is_to_nearest_even() -> None:
    # The largest of the row makes the scale 1.
    values = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantize_rows(values, INT8)[0].tolist() == [[127, 0, 2, 2, 0, -2]]
    values = torch.tensor([[448.0, 17.0, 19.0, -17.0, -19.0, 2.0**-10]])
    assert quantize_rows(values, FP8)[0].float().tolist() == [[448, 16, 20, -16, -20, 0]]


@pytest.mark.parametrize("dtype", [FP8, INT8], ids=["fp8", "int8"])
def test_rows_of_nothing(dtype: torch.dtype) -> None:
    values = torch.zeros(3, 8)
    values[1] = 1e-42
    values[2, 0] = -1e-30
    values[2, 1] = 1.0
    rounded, scale = quantize_rows(values, dtype)
    assert scale[0].item() == scale[1].item() == SMALLEST_SCALE
    back = dequantize_rows(rounded, scale, torch.float32)
    assert not back[:2].any() and torch.equal(back[2, :2], torch.tensor([0.0, 1.0]))
    # What rounds to zero from below is +0.0.
    assert rounded.view(torch.uint8)[2, 0] == 0


@pytest.mark.parametrize("to", ["fp8", "int8"])
@pytest.mark.parametrize("stored", FORMATS)
def test_quantize(make: Make, tmp_path: Path, stored: str, to: str) -> None:
    folder = make(stored).save()
    convert(folder.path, tmp_path / "packed", to="packed")
    quantize(folder.path, tmp_path / "out", to=to)
    packed = load_file(tmp_path / "packed" / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == packed.keys() | {f"{name}.weight_scale" for name in folder.expected}
    for name, tensor in packed.items():
        if not name.endswith(".compressed"):
            assert torch.equal(written[name], tensor), name
    for name, weight in folder.expected.items():
        values, scale = written[f"{name}.compressed"], written[f"{name}.weight_scale"]
        assert values.dtype == DTYPES[to] and values.shape == (len(weight), weight.shape[1] // 2)
        assert (scale.dtype, scale.shape) == (torch.float32, (len(weight), 1))
        rounded, expected_scale = quantize_rows(packed[f"{name}.compressed"], DTYPES[to])
        assert torch.equal(values.view(torch.uint8), rounded.view(torch.uint8))
        assert torch.equal(scale, expected_scale)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "cast",
        "format": f"packed-{to}",
        "sparsity": "2:4",
        "ignore": ["lm_head"],
        "version": 1,
    }


@pytest.mark.parametrize("to", ["fp8", "int8"])
def test_readers_dequantize(make: Make, tmp_path: Path, to: str) -> None:
    folder = make("packed").save()
    quantize(folder.path, tmp_path / "out", to=to)
    checkpoint = Checkpoint.open(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    found = {item.name: item for item in stream(checkpoint) if isinstance(item, PackedLinear)}
    assert found.keys() == folder.expected.keys()
    for name, item in found.items():
        exact = tensors[f"{name}.compressed"].double() * tensors[f"{name}.weight_scale"].double()
        assert torch.equal(item.values, exact.float().bfloat16())
        assert torch.equal(item.bitmask, folder.tensors[f"{name}.bitmask"])
    # Straight to fp32, not by way of bfloat16.
    wide = {i.name: i for i in stream(checkpoint, dtype=torch.float32)}
    exact = tensors[f"{Q0}.compressed"].float() * tensors[f"{Q0}.weight_scale"]
    assert torch.equal(wide[Q0].values, exact)
    assert all(finding.problem is None for finding in check(checkpoint))
    convert(tmp_path / "out", tmp_path / "dense", to="dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    weight = unpack(found[Q0].values, found[Q0].bitmask)
    assert torch.equal(dense[f"{Q0}.weight"], weight) and weight.dtype == torch.bfloat16


def test_sizes(make: Make, tmp_path: Path) -> None:
    folder = make("packed").save()
    quantize(folder.path, tmp_path / "out", to="int8")
    summary = summarise(Checkpoint.open(tmp_path / "out"))
    assert summary.format == "packed-int8" and summary.dtypes[0] == "bfloat16"
    for linear in summary.sparse:
        rows, columns = linear.shape
        # Values, bitmask, scales and X.shape.
        assert linear.stored_bytes == rows * columns * (8 + 2) // 16 + 4 * rows + 16
        assert linear.dense_bytes == 2 * rows * columns
        assert linear.loaded_bytes == rows * columns * 9 // 8


def test_dtype_is_declared_for_readers(make: Make, tmp_path: Path) -> None:
    folder = make("packed")
    folder.config.pop("torch_dtype")
    quantize(folder.save().path, tmp_path / "out", to="fp8")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_quantized_twice_is_refused(make: Make, tmp_path: Path) -> None:
    folder = make("packed").save()
    quantize(folder.path, tmp_path / "out", to="fp8")
    with pytest.raises(CheckpointError, match=r"config\.json: is packed-fp8 already; quantize the"):
        quantize(tmp_path / "out", tmp_path / "twice", to="int8")
    assert not (tmp_path / "twice").exists()


def test_output_is_looked_at_before_anything_is_measured(make: Make, tmp_path: Path) -> None:
    def measure(path: Path) -> dict[str, Any]:
        raise AssertionError(f"{path} was measured")

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        quantize(make("packed").save().path, tmp_path / "out", to="fp8", measure=measure)


def test_measure_sees_both_and_is_kept(make: Make, tmp_path: Path) -> None:
    folder = make("packed").save()
    folder.write_json("cast.json", {"tokens": 7})

    def measure(path: Path) -> dict[str, Any]:
        return {"format": str(summarise(Checkpoint.open(path)).format)}

    record = quantize(folder.path, tmp_path / "out", to="fp8", measure=measure)
    assert record == {
        "format": "packed-fp8",
        "before": {"format": "packed"},
        "after": {"format": "packed-fp8"},
    }
    written = json.loads((tmp_path / "out" / "cast.json").read_text())
    assert written == {"tokens": 7, "quantization": record}


SCALE = f"{Q0}.weight_scale"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        pytest.param({SCALE: (3, 0, float("nan"))}, f"{SCALE}: nan at row 3; scales", id="nan"),
        pytest.param({SCALE: (2, 0, 0.0)}, f"{SCALE}: 0 at row 2; scales", id="zero"),
        pytest.param({SCALE: (2, 0, -1.0)}, f"{SCALE}: -1 at row 2; scales", id="negative"),
        pytest.param({SCALE: (0, 0, float("inf"))}, f"{SCALE}: inf at row 0; scales", id="inf"),
        pytest.param({SCALE: (0, 0, 3e38)}, f"{SCALE}: overflows bfloat16", id="overflow"),
        pytest.param({SCALE: torch.ones(32)}, rf"{SCALE}: shape \[32\] does not fit", id="flat"),
        pytest.param({SCALE: torch.ones(16, 1)}, rf"{SCALE}: shape \[16, 1\]", id="rows"),
        pytest.param(
            {SCALE: torch.ones(32, 1).bfloat16()}, "dtype bfloat16 is not float32", id="dtype"
        ),
        pytest.param({SCALE: None}, rf"{Q0}.compressed: has no {SCALE}", id="missing"),
        pytest.param(
            {f"{Q0}.compressed": torch.ones(32, 16).bfloat16()},
            f"{Q0}.compressed: dtype bfloat16 of a 2:4 linear is not float8_e4m3fn",
            id="values-dtype",
        ),
        pytest.param(
            {f"{Q0}.compressed": torch.full((32, 16), float("nan")).to(FP8)},
            f"{Q0}.compressed: nan at row 0",
            id="values-nan",
        ),
        pytest.param(
            {f"{Q0}.bitmask": torch.full((32, 4), 0x37, dtype=torch.uint8)},
            f"{Q0}.bitmask: 128 of 256 groups do not keep exactly two",
            id="bitmask",
        ),
    ],
)
def test_damage_is_named(make: Make, tmp_path: Path, damage: dict[str, Any], says: str) -> None:
    quantize(make("packed").save().path, tmp_path / "out", to="fp8")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    for name, change in damage.items():
        if change is None:
            del tensors[name]
        elif isinstance(change, tuple):
            tensors[name][change[0], change[1]] = change[2]
        else:
            tensors[name] = change
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=says):
        list(stream(Checkpoint.open(tmp_path / "out")))
    result = CliRunner().invoke(app, ["check", str(tmp_path / "out")])
    assert result.exit_code == 1 and Q0 in result.stderr


def test_no_dtype_to_dequantize_to(make: Make, tmp_path: Path) -> None:
    quantize(make("packed").save().path, tmp_path / "out", to="fp8")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config.pop("torch_dtype")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: says no dtype to dequantize"):
        list(stream(Checkpoint.open(tmp_path / "out")))
