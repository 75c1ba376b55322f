"""Headers: what safetensors writes is read, and no damage gets past as another exception."""

import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.model_loaders.header import DTYPES, read_header


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("header") / "model.safetensors"
    tensors = {
        str(dtype).removeprefix("torch."): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in DTYPES.values()
        if dtype not in (torch.float8_e8m0fnu, torch.complex64)
    }
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, file)
    return file


def test_read_every_dtype(good: Path) -> None:
    checkpoint = Checkpoint(path=good.parent, config={}, entries=read_header(good))
    for name in checkpoint.entries.keys() - {"scalar", "empty"}:
        tensor = checkpoint.read(name)
        assert str(tensor.dtype) == f"torch.{name}"
        assert tensor.to(torch.float64).tolist() == (
            [[0, 1, 1], [1, 1, 1]] if name == "bool" else [[0, 1, 2], [3, 4, 5]]
        )
    assert checkpoint.read("scalar").item() == 3.5
    assert checkpoint.read("empty").shape == (0, 4)


def test_read_is_a_copy(good: Path) -> None:
    checkpoint = Checkpoint(path=good.parent, config={}, entries=read_header(good))
    before = good.read_bytes()
    checkpoint.read("float32").zero_()
    assert checkpoint.read("float32").sum() == 15 and good.read_bytes() == before


def test_read_notices_a_file_that_shrank(good: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(good.read_bytes())
    checkpoint = Checkpoint(path=tmp_path, config={}, entries=read_header(file))
    last = list(checkpoint.entries)[-1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{file}: {last}: truncated while it was read"):
        checkpoint.read(last)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_header_is_refused(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Flip, cut or insert bytes in the header: an error of ours, or still a sound header."""
    whole = good.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    end = 8 + length
    at = data.draw(st.integers(0, end - 1))
    inserted = data.draw(st.binary(max_size=3))
    removed = data.draw(st.integers(0, 3))
    fixed_length = data.draw(st.booleans())
    damaged = whole[:at] + inserted + whole[at + removed :]
    if fixed_length and at >= 8:
        damaged = struct.pack("<Q", end - 8 + len(inserted) - min(removed, end - at)) + damaged[8:]
    file = tmp_path / "model.safetensors"
    file.write_bytes(damaged)
    try:
        entries = read_header(file)
    except CheckpointError as error:
        assert str(file) in str(error) and "\n" not in str(error)
        return
    assert max(entry.end for entry in entries.values()) == len(damaged)
