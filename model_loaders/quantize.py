"""Write a 2:4 checkpoint with 8-bit values: `packed-fp8` or `packed-int8` (docs/formats.md).

Only the sparse linears are rounded, by the rule of rounding.py; their bitmasks, and embeddings,
norms and dense linears, stay as they are. Kernels for 8-bit values are to come: until then such a
checkpoint is dequantized while it is loaded.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cast_serve.model_loaders.checkpoint import CONFIG, Checkpoint, read_json
from cast_serve.model_loaders.convert import convert
from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.model_loaders.formats import Format, recognise
from cast_serve.model_loaders.write import MAX_SHARD_BYTES, PROVENANCE, check_output

FORMATS = {"fp8": Format.PACKED_FP8, "int8": Format.PACKED_INT8}


def quantize(
    source: Path,
    output: Path,
    *,
    to: str,
    measure: Callable[[Path], dict[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Write the 2:4 checkpoint in `source`, of any format that is read, with 8-bit values.

    Args:
        to: "fp8" (float8_e4m3fn) or "int8".
        measure: called with the folder of a checkpoint, before and after; what it finds, such as
            a perplexity, is kept. Without it nothing is said of quality.
        progress: called with (bytes read, bytes in all) after each tensor.

    Returns:
        What cast.json says under "quantization": format, and what was measured "before", "after".

    Raises:
        ValueError: `to` is not one of those.
        CheckpointError: the source is bad, has no 2:4 linear or is quantized already, or the
            output cannot be written.
    """
    if to not in FORMATS:
        raise ValueError(f"to={to!r} is not one of {', '.join(FORMATS)}")
    stored = recognise(Checkpoint.open(source).config, source / CONFIG).format
    if stored.quantized is not None:
        raise CheckpointError(
            source / CONFIG, f"is {stored} already; quantize the checkpoint that it was made from"
        )
    # Here too, because measuring may take hours.
    check_output(output, source=source)
    record: dict[str, Any] = {"format": str(FORMATS[to])}
    if measure is not None:
        record["before"] = measure(source)
    provenance = source / PROVENANCE
    kept = read_json(provenance, "") if provenance.is_file() else {}

    def finish(folder: Path) -> dict[str, Any]:
        if measure is not None:
            record["after"] = measure(folder)
        return kept | {"quantization": record}

    convert(
        source,
        output,
        to=str(FORMATS[to]),
        provenance=finish,
        progress=progress,
        max_shard_bytes=max_shard_bytes,
    )
    return record
