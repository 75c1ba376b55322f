"""A checkpoint folder: its config.json, its safetensors files, and one tensor at a time."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.model_loaders.header import TensorEntry, read_header
from cast_serve.model_loaders.memory import as_bytes, empty

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHTS = "*.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder whose headers have been read and agree with its index; no weights are loaded."""

    path: Path
    config: dict[str, Any]
    entries: dict[str, TensorEntry]

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Read config.json, the index and every header of the folder `path`.

        Raises:
            CheckpointError: no such folder or no permission to read it, no or broken config.json,
                no safetensors, a missing, truncated or damaged shard, or an index that does not
                fit the shards.
        """
        try:
            if not path.is_dir():
                raise CheckpointError(
                    path,
                    "is a file; give the folder that holds config.json and the weights"
                    if path.exists()
                    else "no such folder",
                )
            config = read_json(path / CONFIG, "a checkpoint folder needs one")
            return cls(path=path, config=config, entries=_entries(path))
        except OSError as error:
            # Of a folder on the way that may not be searched, or a name that is too long.
            raise CheckpointError(path, f"cannot be read: {error.strerror}") from error

    def read(self, name: str) -> torch.Tensor:
        """One tensor in memory of its own.

        The file is not mapped: pages of a mapped shard would stay resident and count towards the
        peak.
        """
        entry = self.entries[name]
        tensor = empty(entry.shape, entry.dtype)
        if not entry.nbytes:
            return tensor
        view, filled = as_bytes(tensor), 0
        try:
            # Unbuffered, so that readinto fills the tensor without a second copy.
            with entry.file.open("rb", buffering=0) as stream:
                stream.seek(entry.start)
                while filled < entry.nbytes and (count := stream.readinto(view[filled:])):
                    filled += count
        except OSError as error:
            raise self.error(name, f"cannot be read: {error.strerror}") from error
        if filled < entry.nbytes:
            raise self.error(name, "truncated while it was read; download it again")
        return tensor

    def error(self, name: str, reason: str) -> CheckpointError:
        """A CheckpointError that names tensor `name` and its file."""
        return CheckpointError(self.entries[name].file, reason, name)


def read_json(file: Path, missing: str) -> dict[str, Any]:
    """A JSON object from `file`; CheckpointError saying `missing` if there is no such file."""
    if not file.is_file():
        raise CheckpointError(file, f"no such file; {missing}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(file, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file, f"is not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(file, f"holds a JSON {type(found).__name__}, not an object")
    return found


def _entries(path: Path) -> dict[str, TensorEntry]:
    # The index wins over model.safetensors when a folder has both, as in vLLM.
    index = path / INDEX
    weight_map = _weight_map(index) if index.is_file() else {}
    if weight_map:
        files = [path / name for name in dict.fromkeys(weight_map.values())]
    elif (path / SINGLE).exists():
        files = [path / SINGLE]
    else:
        files = _unindexed(path)
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise CheckpointError(
                    file, f"is also in {entries[name].file.name}; keep one of the two", name
                )
            entries[name] = entry
    for name, shard in weight_map.items():
        if name not in entries:
            raise CheckpointError(index, f"is in no shard, the index says {shard}", name)
        if entries[name].file.name != shard:
            raise CheckpointError(
                index, f"is in {entries[name].file.name}, the index says {shard}", name
            )
    if not entries:
        raise CheckpointError(files[0], "holds no tensors; download the checkpoint again")
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index, "has no weight_map of tensor names to file names")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise CheckpointError(
                index, f"is said to be in {shard!r}, which is no .safetensors file", name
            )
        # The name is checked and not the resolved path: a Hugging Face cache links its shards
        # to ../../blobs.
        if Path(shard).name != shard or "\\" in shard or "\0" in shard:
            raise CheckpointError(
                index, f"is said to be in {shard!r}; a shard is a plain name in the folder", name
            )
        if not (index.parent / shard).is_file():
            raise CheckpointError(
                index.parent / shard, f"no such file, but {INDEX} names it; download it", name
            )
    return weight_map


def _unindexed(path: Path) -> list[Path]:
    """Every .safetensors file, checked for gaps where names are numbered -00001-of-00003."""
    files = sorted(path.glob(WEIGHTS))
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            stem, number, total = match.groups()
            for i in range(1, int(total) + 1):
                shard = path / f"{stem}-{i:0{len(number)}d}-of-{total}.safetensors"
                if not shard.is_file():
                    raise CheckpointError(shard, f"no such file, but {file.name} is; download it")
    if files:
        return files
    if next(path.glob("*.gguf"), None):
        raise CheckpointError(path, "holds GGUF weights; run `cast-model import` on it first")
    for pattern in PICKLES:
        for pickle in path.glob(pattern):
            raise CheckpointError(
                pickle,
                "only safetensors is read, because unpickling runs code; if you trust the file: "
                "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
            )
    raise CheckpointError(path, "holds no .safetensors file")
