"""What a checkpoint holds, from its headers alone: format, linears, bytes."""

from dataclasses import dataclass
from pathlib import Path

from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.model_loaders.formats import Format
from cast_serve.model_loaders.layers import Layers, LinearEntry, dtype_name, find_layers


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts and bytes of a checkpoint.

    Attributes:
        files: number of safetensors files.
        dtypes: of the linears, most bytes first.
        linears: every linear; `sparse` of a plain checkpoint means "if its weights are 2:4".
        other_bytes: tensors that belong to no linear: embeddings, norms, biases.
    """

    path: Path
    format: Format
    model_type: str
    files: int
    dtypes: tuple[str, ...]
    linears: tuple[LinearEntry, ...]
    other_bytes: int

    @property
    def sparse(self) -> tuple[LinearEntry, ...]:
        return tuple(linear for linear in self.linears if linear.sparse)

    @property
    def dense(self) -> tuple[LinearEntry, ...]:
        return tuple(linear for linear in self.linears if not linear.sparse)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors on disk."""
        return self.other_bytes + sum(linear.stored_bytes for linear in self.linears)

    @property
    def dense_bytes(self) -> int:
        """Bytes if every linear were dense."""
        return self.other_bytes + sum(linear.dense_bytes for linear in self.linears)

    @property
    def loaded_bytes(self) -> int:
        """Bytes in memory with the sparse linears packed."""
        return self.other_bytes + sum(linear.loaded_bytes for linear in self.linears)

    @property
    def needs_flag(self) -> bool:
        """Whether serving needs `--quantization cast`, because config.json declares nothing."""
        return self.format is Format.PLAIN


def summarise(checkpoint: Checkpoint, *, layers: Layers | None = None) -> Summary:
    """Summarise `checkpoint` without reading any weights.

    Args:
        layers: what find_layers said of `checkpoint`, if it has been asked.

    Raises:
        CheckpointError: an unknown format, or headers that do not fit it.
    """
    layers = layers or find_layers(checkpoint)
    by_dtype: dict[str, int] = {}
    for linear in layers.linears:
        dtype = dtype_name(linear.dtype)
        by_dtype[dtype] = by_dtype.get(dtype, 0) + linear.stored_bytes
    return Summary(
        path=checkpoint.path,
        format=layers.scheme.format,
        model_type=str(checkpoint.config.get("model_type", "unknown")),
        files=len({entry.file for entry in checkpoint.entries.values()}),
        dtypes=tuple(sorted(by_dtype, key=by_dtype.__getitem__, reverse=True)),
        linears=layers.linears,
        other_bytes=sum(checkpoint.entries[name].nbytes for name in layers.others),
    )
