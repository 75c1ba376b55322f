"""The same 2:4 checkpoint with other weights: every bitmask stays as it is, bit for bit.

What fine-tuning needs. Packing the new weights afresh would not do: a group keeps its slots by
what is not zero, so a kept weight that is zero could lose its slot to its neighbour.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cast_serve.kernels.packing import unpack
from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.model_loaders.convert import add_linear
from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.model_loaders.finite import first_nonfinite
from cast_serve.model_loaders.formats import Format
from cast_serve.model_loaders.layers import (
    MOE_EXPERT,
    WEIGHT,
    dtype_name,
    is_transposed,
)
from cast_serve.model_loaders.stream import PackedLinear, stream
from cast_serve.model_loaders.write import (
    MAX_SHARD_BYTES,
    PROVENANCE,
    ShardWriter,
    copy_other_files,
    new_folder,
    write_config,
    write_json,
)


def kept_slots(linear: PackedLinear) -> torch.Tensor:
    """bool [N, K]: the columns that the bitmask of `linear` keeps, zero or not."""
    return unpack(torch.ones_like(linear.values, dtype=torch.uint8), linear.bitmask).bool()


def rewrite(
    source: Path,
    output: Path,
    weights: Mapping[str, torch.Tensor],
    *,
    to: str,
    provenance: dict[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the 2:4 checkpoint in `source` with `weights` to the new folder `output`.

    Args:
        weights: by tensor name of the dense-stored form, in its layout; each is rounded to the
            dtype that `source` has. A tensor of `source` that is not among them is kept.
        to: "packed" or "dense".
        provenance: written to cast.json.

    Raises:
        CheckpointError: a weight is not zero where its bitmask keeps nothing, or is not finite in
            its dtype; or source or output are at fault.
    """
    checkpoint = Checkpoint.open(source)
    model_type = checkpoint.config.get("model_type")
    dense: list[str] = []
    with new_folder(output, source=source) as folder:
        writer = ShardWriter(folder, max_shard_bytes=max_shard_bytes)
        for item in stream(checkpoint):
            if isinstance(item, PackedLinear):
                weight = weights[item.name + WEIGHT]
                if is_transposed(model_type, item.name):
                    weight = weight.t()
                add_linear(writer, _repack(output, item, weight), Format(to), model_type)
                continue
            tensor = weights.get(item.name, item.tensor).to(item.tensor.dtype)
            _require_finite(output, item.name, tensor)
            writer.add(item.name, tensor)
            if item.linear and item.why_dense != MOE_EXPERT:
                dense.append(item.linear)
        writer.finish()
        copy_other_files(source, folder)
        write_config(folder, checkpoint, stored=Format(to), ignore=dense, dtype=None)
        write_json(folder / PROVENANCE, provenance)


def _repack(output: Path, linear: PackedLinear, weight: torch.Tensor) -> PackedLinear:
    """`linear` with the entries of weight [N, K] in its slots."""
    kept = kept_slots(linear)
    name = linear.name + WEIGHT
    if outside := int((weight[~kept] != 0).sum()):
        raise CheckpointError(
            output, f"{outside} entries are not zero where the pattern keeps nothing", name
        )
    values = weight[kept].reshape(linear.values.shape).to(linear.values.dtype)
    _require_finite(output, name, values)
    values = values.masked_fill(values == 0, 0)
    return PackedLinear(name=linear.name, values=values, bitmask=linear.bitmask)


def _require_finite(output: Path, name: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() and name.endswith(WEIGHT) and first_nonfinite(tensor):
        raise CheckpointError(output, f"is not finite in {dtype_name(tensor.dtype)}", name)
