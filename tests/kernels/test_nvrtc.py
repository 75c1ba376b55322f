"""Compiled kernels on disk: used again, and made again where they cannot be."""

import logging

import pytest

pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")

from cast_serve.kernels import nvrtc
from cast_serve.kernels.nvrtc import Source, cached_cubin

SOURCE = Source(
    name="one.cu",
    text='extern "C" __global__ void one(int* y) { *y = ONE; }',
    headers=(),
    defines=(("ONE", 1),),
    arch="sm_90",
)


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """The names of what is compiled."""
    names = []
    compile_cubin = nvrtc.compile_cubin

    def recorded(source: Source) -> bytes:
        names.append(source.name)
        return compile_cubin(source)

    monkeypatch.setattr(nvrtc, "compile_cubin", recorded)
    return names


def test_cubin_is_compiled_once(tmp_path, compiled):
    cubin = cached_cubin(SOURCE, tmp_path / "cubin")
    assert cubin.startswith(b"\x7fELF")
    assert cached_cubin(SOURCE, tmp_path / "cubin") == cubin
    assert compiled == ["one.cu"]


@pytest.mark.parametrize("damage", [b"", b"\x7fELF", None], ids=["empty", "cut off", "folder"])
def test_damaged_cubin_is_named_and_compiled_anew(tmp_path, compiled, caplog, damage):
    cubin = cached_cubin(SOURCE, tmp_path)
    (path,) = tmp_path.iterdir()
    path.unlink()
    if damage is None:
        path.mkdir()
    else:
        path.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert cached_cubin(SOURCE, tmp_path) == cubin
    assert compiled == ["one.cu", "one.cu"]
    assert path.name in caplog.text and "compiled again" in caplog.text
    if damage is not None:
        assert cached_cubin(SOURCE, tmp_path) == cubin
        assert len(compiled) == 2


def test_folder_that_cannot_be_written(tmp_path, compiled, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        assert cached_cubin(SOURCE, tmp_path / "file" / "cubin").startswith(b"\x7fELF")
    assert "kernels are compiled again at every start" in caplog.text
