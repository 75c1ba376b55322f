"""Any format in, packed linears and dense tensors out, one at a time.

Shapes   PackedLinear: values [N, K/2], bitmask uint8 [N, K/8] (kernels/packing.py).
Memory   What was yielded and one dense layer: each layer is read, packed and let go before the
         next, and work within a layer goes through blocks of rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from cast_serve.kernels.packing import (
    BLOCK_ENTRIES,
    COLUMNS_PER_BYTE,
    PatternError,
    check_mask,
    pack,
)
from cast_serve.kernels.pattern import nm_mask
from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.model_loaders.finite import dense_column, first_nonfinite, require_finite
from cast_serve.model_loaders.formats import Format
from cast_serve.model_loaders.layers import (
    ROW_SCALE,
    SCALE,
    WEIGHT_DTYPES,
    Layers,
    LinearEntry,
    dtype_name,
    find_layers,
    main_error,
)
from cast_serve.model_loaders.memory import empty
from cast_serve.model_loaders.rounding import dequantize_rows

# Rows go through in blocks, as packing takes about 20 bytes an entry and a mask 9.
# Small ones: temporaries of 1 << 18 and up fragment the heap (20 to 40 MB), and are no faster.
_BLOCK_ENTRIES = 1 << 15

# How the reason of a linear starts that stays dense because of what its weights are.
NOT_SPARSE = "not 2:4"


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedLinear:
    """Linear `name` (without `.weight`) as values [N, K/2] and bitmask uint8 [N, K/8]."""

    name: str
    values: torch.Tensor
    bitmask: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseTensor:
    """Tensor `name` as stored.

    Attributes:
        linear: the module name if it is the weight of a linear that stays dense.
        why_dense: the reason then.
    """

    name: str
    tensor: torch.Tensor
    linear: str | None = None
    why_dense: str | None = None


def stream(
    checkpoint: Checkpoint, *, layers: Layers | None = None, dtype: torch.dtype | None = None
) -> Iterator[PackedLinear | DenseTensor]:
    """Every tensor of `checkpoint`, in the order of the files, sparse linears packed.

    Pruning and folding of a training checkpoint happen here: mask of the unscaled weight, scale
    in fp32, one rounding to `dtype`. Without a quantization_config a linear that is not 2:4 comes
    as a DenseTensor with the reason.

    Args:
        layers: what find_layers said of `checkpoint`, if it has been asked.
        dtype: what weights are cast to; None keeps what is stored.

    Raises:
        CheckpointError: data at fault: a declared linear that is not 2:4, a bitmask group without
            two bits, a NaN or infinity.
    """
    layers = layers or find_layers(checkpoint)
    linears = {linear.tensors[0]: linear for linear in layers.linears}
    parts = {name for linear in layers.linears for name in linear.tensors[1:]}
    for name in checkpoint.entries:
        if name in parts:
            continue
        linear = linears.get(name)
        if linear is None or not linear.sparse:
            yield _dense(checkpoint, name, linear, dtype)
        else:
            yield load_linear(checkpoint, layers.scheme.format, linear, dtype=dtype)


def load_linear(
    checkpoint: Checkpoint,
    stored: Format,
    linear: LinearEntry,
    *,
    dtype: torch.dtype | None = None,
) -> PackedLinear | DenseTensor:
    """One sparse linear, packed; dense only if it is not 2:4 and nothing declared it to be."""
    if stored.stored_packed:
        bitmask = _read_good_bitmask(checkpoint, linear)
        values = read_values(checkpoint, linear, bitmask, dtype=dtype)
    else:
        weight = read_weight(checkpoint, linear)
        try:
            if stored is Format.TRAINING:
                values, bitmask = _fold(checkpoint, linear, weight, dtype or linear.dtype)
            else:
                values, bitmask = _pack_blocks(weight, weight.dtype, lambda rows: weight[rows])
        except PatternError as error:
            if stored is Format.PLAIN:
                tensor = weight.t() if linear.transposed else weight
                return DenseTensor(
                    name=linear.tensors[0],
                    tensor=_cast(checkpoint, linear.tensors[0], tensor, dtype),
                    linear=linear.name,
                    why_dense=f"{NOT_SPARSE}: {error}",
                )
            raise main_error(
                checkpoint,
                linear,
                f"{error}; prune it to 2:4 or add it to quantization_config.ignore",
            ) from error
    values = _cast(checkpoint, linear.tensors[0], values, dtype)
    return PackedLinear(name=linear.name, values=values, bitmask=bitmask)


def read_weight(checkpoint: Checkpoint, linear: LinearEntry) -> torch.Tensor:
    """The dense-stored weight [N, K] of `linear`, finite; a transposed view of a Conv1D's."""
    weight = checkpoint.read(linear.tensors[0])
    require_finite(checkpoint, linear.tensors[0], weight)
    return weight.t() if linear.transposed else weight


def read_bitmask(checkpoint: Checkpoint, linear: LinearEntry) -> torch.Tensor:
    """The bitmask [N, K/8] of a packed `linear`; CheckpointError if X.shape says another shape."""
    _, bitmask, shape, *_ = linear.tensors
    said = checkpoint.read(shape).flatten().tolist()
    if said != list(linear.shape):
        raise checkpoint.error(shape, f"says {said}, but the values make {list(linear.shape)}")
    return checkpoint.read(bitmask)


def _read_good_bitmask(checkpoint: Checkpoint, linear: LinearEntry) -> torch.Tensor:
    bitmask = read_bitmask(checkpoint, linear)
    report = check_mask(bitmask, limit=1)
    if not report.ok:
        raise checkpoint.error(
            linear.tensors[1],
            f"{report.faulty} of {report.groups} groups do not keep exactly two columns, "
            f"the first at {report.first[0]}; the file is damaged",
        )
    return bitmask


def read_values(
    checkpoint: Checkpoint,
    linear: LinearEntry,
    bitmask: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The finite values [N, K/2] of a packed `linear`, -0.0 made +0.0; bitmask [N, K/8].

    8-bit values are dequantized in fp32 and rounded once, to `dtype` or the linear's own; others
    come as they are stored.
    """
    values = checkpoint.read(linear.tensors[0])
    if found := first_nonfinite(values):
        (row, slot), value = found
        column = dense_column(bitmask[row], slot)
        raise main_error(
            checkpoint,
            linear,
            f"{value} at row {row}, column {column}; weights must be finite",
        )
    if linear.name + ROW_SCALE in linear.tensors:
        scale = _read_row_scale(checkpoint, linear)
        values = dequantize_rows(values, scale, dtype or linear.dtype)
        if first_nonfinite(values):
            raise checkpoint.error(
                linear.name + ROW_SCALE,
                f"overflows {dtype_name(values.dtype)} times its values; choose a wider dtype",
            )
    return values.masked_fill_(values == 0, 0)


def _read_row_scale(checkpoint: Checkpoint, linear: LinearEntry) -> torch.Tensor:
    """The scales [N, 1] of 8-bit values, each finite and above zero."""
    name = linear.name + ROW_SCALE
    scale = checkpoint.read(name)
    bad = ~(scale.isfinite() & (scale > 0)).flatten()
    if bad.any():
        row = int(bad.nonzero()[0])
        raise checkpoint.error(
            name, f"{scale[row].item():g} at row {row}; scales must be finite and above 0"
        )
    return scale


def _fold(
    checkpoint: Checkpoint, linear: LinearEntry, weight: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = None
    if (name := linear.name + SCALE) in linear.tensors:
        scale = checkpoint.read(name)
        require_finite(checkpoint, name, scale)
    values, bitmask = prune_fold_pack(weight, scale, dtype)
    if first_nonfinite(values):
        raise main_error(
            checkpoint,
            linear,
            f"overflows {dtype_name(dtype)} with its scale folded in; choose a wider dtype",
        )
    return values, bitmask


def prune_fold_pack(
    weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune by magnitude, fold the scale in fp32, round once, pack.

    Args:
        weight: [N, K], any dtype of weights, on any device.
        scale: [N, n], column c is of block c // (K/n), where the weight is; None is all ones.
        dtype: of the values returned.

    Returns:
        values [N, K/2] and bitmask uint8 [N, K/8], on the weight's device.
    """

    def folded(rows: slice) -> torch.Tensor:
        kept = weight[rows].float() * nm_mask(weight[rows])
        if scale is not None:
            width = weight.shape[1] // scale.shape[1]
            kept *= scale[rows].float().repeat_interleave(width, dim=1)
        return kept.to(dtype)

    return _pack_blocks(weight, dtype, folded)


def _pack_blocks(
    weight: torch.Tensor, dtype: torch.dtype, block: Callable[[slice], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack what `block` makes of some rows of weight [N, K], a few rows at a time."""
    rows, columns = weight.shape
    on_cpu = weight.device.type == "cpu"
    make = empty if on_cpu else partial(torch.empty, device=weight.device)
    values = make((rows, columns // 2), dtype=dtype)
    bitmask = make((rows, columns // COLUMNS_PER_BYTE), dtype=torch.uint8)
    # On a device it is the launches of a block that take time.
    step = max(1, (_BLOCK_ENTRIES if on_cpu else BLOCK_ENTRIES) // max(1, columns))
    try:
        for start in range(0, rows, step):
            some = slice(start, start + step)
            values[some], bitmask[some] = pack(block(some))
    except PatternError:
        # The error knows rows of its block and counts nothing beyond: say it of the whole.
        pack(weight)
        raise
    return values, bitmask


def _dense(
    checkpoint: Checkpoint, name: str, linear: LinearEntry | None, dtype: torch.dtype | None
) -> DenseTensor:
    tensor = checkpoint.read(name)
    require_finite(checkpoint, name, tensor)
    return DenseTensor(
        name=name,
        tensor=_cast(checkpoint, name, tensor, dtype),
        linear=linear.name if linear else None,
        why_dense=linear.why_dense if linear else None,
    )


def _cast(
    checkpoint: Checkpoint, name: str, tensor: torch.Tensor, dtype: torch.dtype | None
) -> torch.Tensor:
    if dtype is None or tensor.dtype not in WEIGHT_DTYPES:
        return tensor
    cast = tensor.to(dtype)
    if tensor.dtype != dtype and first_nonfinite(cast) and not first_nonfinite(tensor):
        raise checkpoint.error(name, f"overflows {dtype_name(dtype)}; choose a wider dtype")
    return cast
