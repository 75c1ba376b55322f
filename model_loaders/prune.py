"""One-shot pruning of a dense checkpoint to dense-stored 2:4, without training.

It shows what a model costs and weighs at 2:4; its quality needs training (cast-train).
"""

from collections.abc import Callable
from pathlib import Path

import torch

from cast_serve.kernels.pattern import nm_mask
from cast_serve.model_loaders.checkpoint import CONFIG, Checkpoint
from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.model_loaders.finite import require_finite
from cast_serve.model_loaders.formats import SPARSITY, Format
from cast_serve.model_loaders.layers import MOE_EXPERT, find_layers
from cast_serve.model_loaders.stream import read_weight
from cast_serve.model_loaders.write import (
    MAX_SHARD_BYTES,
    PROVENANCE,
    ShardWriter,
    copy_other_files,
    new_folder,
    write_config,
    write_json,
)

# In each group the two largest |w| survive; the only criterion that needs no data.
METHODS = ("magnitude",)

# nm_mask takes about 9 bytes an entry of fp32: rows go through it in blocks.
_BLOCK_ENTRIES = 1 << 20


def prune(
    source: Path,
    output: Path,
    *,
    method: str = "magnitude",
    progress: Callable[[int, int], None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Prune every linear in the transformer blocks of `source` to 2:4, into the folder `output`.

    Args:
        method: "magnitude".
        progress: called with (bytes read, bytes in all) after each tensor.

    Raises:
        ValueError: `method` is not known.
        CheckpointError: the source is bad, is not a plain dense checkpoint or has no linear to
            prune, or the output cannot be written.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}")
    checkpoint = Checkpoint.open(source)
    layers = find_layers(checkpoint)
    if layers.scheme.format is not Format.PLAIN:
        raise CheckpointError(
            source / CONFIG,
            f"declares {layers.scheme.format}, which is 2:4 as it is; prune a dense checkpoint",
        )
    linears = {linear.tensors[0]: linear for linear in layers.linears}
    if not any(linear.sparse for linear in layers.linears):
        raise CheckpointError(source, "has no linear that could be 2:4")
    total, done = sum(entry.nbytes for entry in checkpoint.entries.values()), 0
    with new_folder(output, source=source) as folder:
        writer = ShardWriter(folder, max_shard_bytes=max_shard_bytes)
        for name, entry in checkpoint.entries.items():
            linear = linears.get(name)
            if linear and linear.sparse:
                weight = read_weight(checkpoint, linear)
                prune_magnitude_(weight)
                tensor = weight.t() if linear.transposed else weight
            else:
                tensor = checkpoint.read(name)
                require_finite(checkpoint, name, tensor)
            writer.add(name, tensor)
            done += entry.nbytes
            if progress:
                progress(done, total)
        writer.finish()
        copy_other_files(source, folder)
        ignore = [
            linear.name for linear in layers.linears if linear.why_dense not in (None, MOE_EXPERT)
        ]
        write_config(folder, checkpoint, stored=Format.DENSE, ignore=ignore, dtype=None)
        write_json(folder / PROVENANCE, {"method": f"one-shot {method}", "sparsity": SPARSITY})


def prune_magnitude_(weight: torch.Tensor) -> None:
    """Zero, in place, all but the two largest magnitudes in every four columns of [N, K]."""
    step = max(1, _BLOCK_ENTRIES // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        block = weight[start : start + step]
        block.masked_fill_(~nm_mask(block), 0)
