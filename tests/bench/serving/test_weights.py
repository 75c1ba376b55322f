"""Random checkpoints: the same weights in both forms, named as transformers names them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from cast_serve.bench.serving.models import find_served_model, write_model
from cast_serve.bench.serving.weights import write_weights
from cast_serve.model_loaders.convert import convert

MODEL = find_served_model("tiny")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """By whether it is packed."""
    written = {}
    for sparse in (False, True):
        written[sparse] = tmp_path_factory.mktemp("checkpoints") / str(sparse)
        write_model(MODEL, written[sparse], sparse=sparse)
        write_weights(MODEL, written[sparse], sparse=sparse, device="cpu")
    return written


def test_forms_are_equal(folders: dict[bool, Path], tmp_path: Path) -> None:
    convert(folders[True], tmp_path / "unpacked", to="dense")
    unpacked = load_file(tmp_path / "unpacked" / "model.safetensors")
    dense = load_file(folders[False] / "model.safetensors")
    assert unpacked.keys() == dense.keys()
    assert all(torch.equal(unpacked[name], tensor) for name, tensor in dense.items())


def test_names_and_shapes(folders: dict[bool, Path]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folders[False]))
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    dense = load_file(folders[False] / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in dense.items()} == expected
