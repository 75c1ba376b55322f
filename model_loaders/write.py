"""Writing a checkpoint folder: all of it or nothing, next to its source and never in it."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from cast_serve.model_loaders.checkpoint import CONFIG, INDEX, SINGLE, Checkpoint
from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.model_loaders.formats import QUANT_METHOD, SPARSITY, VERSION, Format
from cast_serve.model_loaders.layers import dtype_name

PROVENANCE = "cast.json"
# A shard is held in memory until it is full, so this bounds what writing adds to the peak.
MAX_SHARD_BYTES = 2_000_000_000

_WEIGHT_FILES = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json"),
    *(".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"),
)
_DISK_FULL = "the disk is full; free space or choose another output"


@contextmanager
def new_folder(output: Path, *, source: Path | None = None) -> Iterator[Path]:
    """A temporary folder that becomes `output` at the end, or goes on any error.

    It is beside `output`, which it replaces, or in an `output` that cannot be replaced: a mount
    point. Its content is then moved up, config.json last: without it there is no checkpoint.

    Raises:
        CheckpointError: `output` exists and is not an empty folder, is `source` or inside it, or
            the disk refuses (full, read-only).
    """
    check_output(output, source=source)
    final = output.resolve()
    try:
        temporary = _make_temporary(final)
        try:
            yield temporary
            _settle(temporary)
            if temporary.parent == final:
                _move_up(temporary)
            else:
                # rename, unlike replace of files, needs the target absent or an empty folder.
                temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _sync_path(temporary.parent)
    except OSError as error:
        raise _write_error(output, error) from error
    except SafetensorError as error:
        # The library wraps the system's error in text of its own.
        if f"os error {errno.ENOSPC}" in str(error):
            raise CheckpointError(output, _DISK_FULL) from error
        raise CheckpointError(output, f"cannot be written: {error}") from error


def check_output(output: Path, *, source: Path | None = None) -> None:
    """Refuse before any work what `new_folder` refuses.

    Raises:
        CheckpointError: as new_folder, but for what the disk refuses when it is written to.
    """
    final = output.resolve()
    if source is not None and final.is_relative_to(source.resolve()):
        raise CheckpointError(
            output, f"is in the folder that is read, {source}; choose another output"
        )
    try:
        taken = final.exists() and (not final.is_dir() or any(final.iterdir()))
    except OSError as error:
        raise _write_error(output, error) from error
    if taken:
        raise CheckpointError(output, "exists and is not an empty folder; choose another")


def _make_temporary(final: Path) -> Path:
    """Make a folder beside `final`, or in it if it is there and cannot be replaced."""
    beside = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    final.parent.mkdir(parents=True, exist_ok=True)
    # A leftover can only be of a dead process that had our id.
    shutil.rmtree(beside, ignore_errors=True)
    if final.exists():
        try:
            beside.mkdir()
            # Tried now, not after hours of work: os.path.ismount misses what is bound to a folder
            # of the same disk, and the parent may be read-only.
            beside.rename(final)
        except OSError:
            shutil.rmtree(beside, ignore_errors=True)
            inside = final / beside.name
            inside.mkdir()
            return inside
    beside.mkdir()
    return beside


def _move_up(temporary: Path) -> None:
    """Move the content of `temporary` into the folder that it is in, all of it or nothing."""
    final = temporary.parent
    if list(final.iterdir()) != [temporary]:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
    moved: list[Path] = []
    try:
        for entry in sorted(temporary.iterdir(), key=lambda entry: entry.name == CONFIG):
            if entry.name == CONFIG:
                _sync_path(final)
            moved.append(final / entry.name)
            entry.rename(moved[-1])
    except BaseException:
        for path in moved:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise


class ShardWriter:
    """Collects tensors into safetensors shards of at most `max_shard_bytes` in `folder`.

    A tensor larger than that gets a shard of its own. One shard is named model.safetensors; more
    are numbered and get an index.
    """

    def __init__(self, folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        if max_shard_bytes <= 0:
            raise ValueError(f"max_shard_bytes={max_shard_bytes} must be positive")
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._names: set[str] = set()
        self._shards: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add `tensor`, any shape and strides, under a name not yet used."""
        assert name not in self._names, f"{name} added twice"
        self._names.add(name)
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write the last shard, name the shards, and write the index if there are several."""
        if self._pending or not self._shards:
            self._flush()
        if len(self._shards) == 1:
            self._shards[0][0].rename(self._folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, (file, names) in enumerate(self._shards, 1):
            shard = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            file.rename(self._folder / shard)
            weight_map.update(dict.fromkeys(names, shard))
        write_json(
            self._folder / INDEX,
            {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map},
        )

    def _flush(self) -> None:
        file = self._folder / f"shard-{len(self._shards)}.safetensors"
        # transformers refuses files without this metadata.
        save_file(self._pending, file, metadata={"format": "pt"})
        self._shards.append((file, list(self._pending)))
        self._pending, self._pending_bytes = {}, 0


def write_config(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    stored: Format,
    ignore: list[str],
    dtype: torch.dtype | None,
) -> None:
    """Write the config.json of `checkpoint` to `folder`, declared as `stored`.

    Args:
        ignore: module names that stay dense.
        dtype: what the weights were cast to, None if they were not.
    """
    config = {
        key: value
        for key, value in checkpoint.config.items()
        if key not in ("quantization_config", "compression_config")
    }
    if isinstance(text := config.get("text_config"), dict):
        config["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
    if dtype is not None:
        # `torch_dtype` is what transformers wrote before 5.
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        config.update(dict.fromkeys(keys, dtype_name(dtype)))
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "format": str(stored),
        "sparsity": SPARSITY,
        "ignore": ignore,
        "version": VERSION,
    }
    write_json(folder / CONFIG, config)


def copy_other_files(source: Path, folder: Path) -> None:
    """Copy what is neither weights nor config.json: tokenizer, generation config, model card...

    Hidden files stay behind, and so do subfolders that hold weights of their own.
    """
    for file in sorted(source.iterdir()):
        if file.name.startswith(".") or file.name == CONFIG or _is_weights(file):
            continue
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
        elif file.is_dir() and not any(_is_weights(inner) for inner in file.rglob("*")):
            shutil.copytree(file, folder / file.name)


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_weights(file: Path) -> bool:
    return file.name.endswith(_WEIGHT_FILES)


def _settle(folder: Path) -> None:
    """Give files the permissions that the umask gave `folder`, and flush everything to disk."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            # safetensors writes files that only their owner can read.
            path.chmod(mode)
        _sync_path(path)
    _sync_path(folder)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_error(output: Path, error: OSError) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(output, _DISK_FULL)
    return CheckpointError(output, f"cannot be written: {error.strerror or error}")
