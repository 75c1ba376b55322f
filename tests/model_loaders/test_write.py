"""A new folder where the output is a mount point, as in a container, and cannot be replaced."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.model_loaders.write import new_folder

# Writes a checkpoint into the folder that is its argument, and lists it.
PROGRAM = """
import sys
from pathlib import Path
from cast_serve.model_loaders.write import new_folder

out = Path(sys.argv[1])
with new_folder(out) as folder:
    assert folder.stat().st_dev == out.stat().st_dev, "written to another disk"
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(name)
    (folder / "original").mkdir()
print(sorted(entry.name for entry in out.iterdir()))
"""
WRITTEN = "['config.json', 'model.safetensors', 'original']\n"


@pytest.mark.parametrize("mount", ['-t tmpfs tmpfs "$0"', '--bind "$0" "$0"'], ids=["disk", "bind"])
def test_mount_point(tmp_path: Path, mount: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    private = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    tried = subprocess.run([*private, f"mount {mount}", out], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"needs user namespaces: {tried.stderr.strip()}")
    done = subprocess.run(
        [*private, f'mount {mount} && exec "$@"', out, sys.executable, "-c", PROGRAM, out],
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == (WRITTEN, "")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that cannot be replaced."""
    folder = tmp_path / "out"
    folder.mkdir()
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if target == folder:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    return folder


def write(folder: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(name)
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")


def test_config_comes_last(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is moved in part is no checkpoint."""
    moved = []
    rename = Path.rename

    def note(path: Path, target: Path) -> Path:
        rename(path, target)
        moved.append(target.name)
        return target

    monkeypatch.setattr(Path, "rename", note)
    with new_folder(out) as folder:
        write(folder)
    assert sorted(moved) == ["config.json", "model.safetensors", "original"]
    assert moved[-1] == "config.json"


def test_failed_move_leaves_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "config.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with (
        pytest.raises(CheckpointError, match="cannot be written: Input/output error"),
        new_folder(out) as folder,
    ):
        write(folder)
    assert list(out.iterdir()) == []


def test_failed_write_leaves_nothing(out: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(out) as folder:
        write(folder)
        raise KeyboardInterrupt
    assert list(out.iterdir()) == []


def test_folder_that_another_filled(out: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="cannot be written: Directory not empty"),
        new_folder(out) as folder,
    ):
        write(folder)
        (out / "config.json").write_text("precious")
    assert {path.name: path.read_text() for path in out.iterdir()} == {"config.json": "precious"}
