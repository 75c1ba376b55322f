"""Convert any format that is read to those that are written: packed and dense-stored 2:4.

The dense form keeps `quantization_config` too: transformers warns about a quant_method that it
does not know and loads the weights as they are, while vLLM then finds the plugin.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cast_serve.kernels.packing import unpack
from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.model_loaders.formats import Format
from cast_serve.model_loaders.layers import (
    BITMASK,
    MOE_EXPERT,
    ROW_SCALE,
    SHAPE,
    VALUES,
    WEIGHT,
    WEIGHT_DTYPES,
    declared_dtype,
    dtype_name,
    find_layers,
    is_transposed,
)
from cast_serve.model_loaders.rounding import quantize_rows
from cast_serve.model_loaders.stream import NOT_SPARSE, PackedLinear, stream
from cast_serve.model_loaders.write import (
    MAX_SHARD_BYTES,
    PROVENANCE,
    ShardWriter,
    copy_other_files,
    new_folder,
    write_config,
    write_json,
)

WRITTEN = (Format.PACKED, Format.DENSE, Format.PACKED_FP8, Format.PACKED_INT8)


def convert(
    source: Path,
    output: Path,
    *,
    to: str,
    dtype: torch.dtype | None = None,
    provenance: dict[str, Any] | Callable[[Path], dict[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the checkpoint in `source`, of any format that is read, to the new folder `output`.

    Training checkpoints are pruned and folded. `output` appears when it is complete, or not at
    all; `source` is only read.

    Args:
        to: "packed", "dense", "packed-fp8" or "packed-int8".
        dtype: bfloat16, float16 or float32 that floating weights are cast to, after pruning and
            folding; None keeps what is stored.
        provenance: written to cast.json, or what makes that of the otherwise complete folder;
            without it a cast.json of the source is kept.
        progress: called with (bytes read, bytes in all) after each tensor.

    Raises:
        ValueError: `to` or `dtype` is not one of those.
        CheckpointError: the source is bad or has no 2:4 linear, or the output cannot be written.
    """
    if to not in WRITTEN:
        raise ValueError(f"to={to!r} is not one of {', '.join(WRITTEN)}")
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        allowed = ", ".join(map(dtype_name, WEIGHT_DTYPES))
        raise ValueError(f"dtype={dtype_name(dtype)} is not one of {allowed}")
    checkpoint = Checkpoint.open(source)
    layers = find_layers(checkpoint)
    stored_bytes = {linear.name: linear.stored_bytes for linear in layers.linears}
    total = sum(entry.nbytes for entry in checkpoint.entries.values())
    done, packed = 0, 0
    dense: dict[str, str] = {}
    stored = Format(to)
    declared = dtype
    with new_folder(output, source=source) as folder:
        writer = ShardWriter(folder, max_shard_bytes=max_shard_bytes)
        for item in stream(checkpoint, layers=layers, dtype=dtype):
            if isinstance(item, PackedLinear):
                packed += 1
                # A reader of 8-bit values dequantizes to what config.json says.
                if stored.quantized and not declared_dtype(checkpoint.config):
                    declared = declared or item.values.dtype
                add_linear(writer, item, stored, checkpoint.config.get("model_type"))
                done += stored_bytes[item.name]
            else:
                writer.add(item.name, item.tensor)
                if item.linear and item.why_dense != MOE_EXPERT:
                    dense[item.linear] = item.why_dense or ""
                done += checkpoint.entries[item.name].nbytes
            if progress:
                progress(done, total)
        if not packed:
            raise _nothing_sparse(checkpoint, dense)
        writer.finish()
        copy_other_files(source, folder)
        write_config(folder, checkpoint, stored=stored, ignore=list(dense), dtype=declared)
        if provenance is not None:
            record = provenance(folder) if callable(provenance) else provenance
            write_json(folder / PROVENANCE, record)


def add_linear(
    writer: ShardWriter, linear: PackedLinear, stored: Format, model_type: object
) -> None:
    """Add a linear to what `writer` writes in format `stored`; 8-bit values are rounded here."""
    if stored.stored_packed:
        rows, columns = linear.values.shape[0], linear.values.shape[1] * 2
        values = linear.values
        if stored.quantized:
            values, scale = quantize_rows(values, stored.quantized)
            writer.add(linear.name + ROW_SCALE, scale)
        writer.add(linear.name + VALUES, values)
        writer.add(linear.name + BITMASK, linear.bitmask)
        writer.add(linear.name + SHAPE, torch.tensor([[rows], [columns]]))
        return
    weight = unpack(linear.values, linear.bitmask)
    writer.add(
        linear.name + WEIGHT, weight.t() if is_transposed(model_type, linear.name) else weight
    )


def _nothing_sparse(checkpoint: Checkpoint, dense: dict[str, str]) -> CheckpointError:
    tried = {name: why for name, why in dense.items() if why.startswith(NOT_SPARSE)}
    if not tried:
        return CheckpointError(checkpoint.path, "has no linear that could be 2:4")
    name, why = next(iter(tried.items()))
    return checkpoint.error(
        name + WEIGHT,
        f"{why}; none of {len(tried)} linears is 2:4, prune first: "
        f"`cast-model prune {checkpoint.path} -o OUT`",
    )
