"""The linears of a checkpoint, from its headers alone: which are sparse, and how each is stored.

Shapes   A linear X maps K inputs to N outputs.
         dense     X.weight [N, K]  (GPT-2's Conv1D: [K, N])
         packed    X.compressed [N, K/2], X.bitmask uint8 [N, K/8], X.shape int64 [2] or [2, 1]
         8-bit     packed, and X.weight_scale fp32 [N, 1]
         training  X.weight and X.cast_scale [N, n], K % n == 0
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from cast_serve.kernels.packing import COLUMNS_PER_BYTE, check_shape
from cast_serve.model_loaders.checkpoint import CONFIG, Checkpoint
from cast_serve.model_loaders.complete import require_complete
from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.model_loaders.formats import Format, Scheme, recognise
from cast_serve.model_loaders.header import TensorEntry

WEIGHT, BIAS = ".weight", ".bias"
VALUES, BITMASK, SHAPE, SCALE = ".compressed", ".bitmask", ".shape", ".cast_scale"
ROW_SCALE = ".weight_scale"
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_LAYER_NUMBER = re.compile(r"(?:^|\.)\d+\.")
_EMBEDDING = re.compile(r"embed|^(?:wte|wpe|shared|relative_attention_bias)$")
_ROUTERS = {"gate", "router", "shared_expert_gate"}
_CONV1D = {"c_attn", "q_attn", "c_proj", "c_fc"}

OUTSIDE, MOE_EXPERT = "outside the layers", "MoE expert"


@dataclass(frozen=True, kw_only=True)
class LinearEntry:
    """One linear as it is stored.

    Attributes:
        name: module name, without `.weight`.
        sparse: claimed to be 2:4; what is stored dense has not been looked at yet.
        shape: (N, K), outputs and inputs, whatever the orientation on disk.
        dtype: of the weight; of 8-bit values, what they are dequantized to.
        tensors: the tensors that hold it, the weight or values first.
        transposed: a dense weight is [K, N] on disk.
        why_dense: why it is not sparse; None where it is.
    """

    name: str
    sparse: bool
    shape: tuple[int, int]
    dtype: torch.dtype
    tensors: tuple[str, ...]
    stored_bytes: int
    transposed: bool = False
    why_dense: str | None = None

    @property
    def dense_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def loaded_bytes(self) -> int:
        """What it takes in memory: values and bitmask where it is sparse."""
        if not self.sparse:
            return self.dense_bytes
        return self.dense_bytes // 2 + math.prod(self.shape) // COLUMNS_PER_BYTE


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The tensors of a checkpoint, sorted: linears, and names of all that is not in one."""

    scheme: Scheme
    linears: tuple[LinearEntry, ...]
    others: tuple[str, ...]


def find_layers(checkpoint: Checkpoint) -> Layers:
    """Sort the tensors of `checkpoint` and check that each linear is stored as its format says.

    Raises:
        CheckpointError: an unknown format, or tensors that do not belong together, or one that is
            missing where config.json declares a format.
    """
    scheme = recognise(checkpoint.config, checkpoint.path / CONFIG)
    finder = _Finder(checkpoint=checkpoint, scheme=scheme)
    linears = [found for name in checkpoint.entries if (found := finder.linear(name)) is not None]
    taken = {name for linear in linears for name in linear.tensors}
    others = tuple(name for name in checkpoint.entries if name not in taken)
    for name in others:
        finder.check_other(name)
    layers = Layers(scheme=scheme, linears=tuple(linears), others=others)
    if scheme.format is not Format.PLAIN:
        require_whole(checkpoint, layers)
    return layers


def require_whole(checkpoint: Checkpoint, layers: Layers) -> None:
    """Check that no tensor of the model is missing from `checkpoint`.

    Raises:
        CheckpointError: one is.
    """
    shapes = {linear.name: linear.shape for linear in layers.linears}
    others = {name: checkpoint.entries[name].shape for name in layers.others}
    require_complete(checkpoint, shapes | others)


def require_served(checkpoint: Checkpoint, layers: Layers) -> None:
    """Check that vLLM has a layer for every linear that is stored packed.

    It has none for what its own kernels run: experts, routers and the head. compressed-tensors
    packs those, too; `cast-model unpack` reads them.

    Raises:
        CheckpointError: it has none for one.
    """
    for linear in layers.linears:
        stored, last = linear.tensors[0], linear.name.rpartition(".")[2]
        kind = "lm_head" if last == "lm_head" else why_by_place(linear.name)
        if stored.endswith(VALUES) and kind not in (None, OUTSIDE):
            raise checkpoint.error(
                stored,
                f"is packed, and vLLM runs no packed {kind}; serve what cast-model unpack makes",
            )


def is_transposed(model_type: object, module: str) -> bool:
    """Whether the dense weight of `module` is [in, out] on disk: the Conv1D layers of GPT-2."""
    return model_type == "gpt2" and module.rpartition(".")[2] in _CONV1D


def why_by_place(module: str) -> str | None:
    """Why linear `module` stays dense by where it is in the model, unless it is stored packed."""
    if not _LAYER_NUMBER.search(module):
        return OUTSIDE
    if ".experts." in module:
        return MOE_EXPERT
    return "MoE router" if module.rpartition(".")[2] in _ROUTERS else None


@dataclass(frozen=True, kw_only=True)
class _Finder:
    checkpoint: Checkpoint
    scheme: Scheme

    def _get(self, name: str) -> TensorEntry | None:
        return self.checkpoint.entries.get(name)

    def linear(self, name: str) -> LinearEntry | None:
        """The linear whose main tensor is `name`, None if it is not the main tensor of one."""
        if name.endswith(VALUES):
            return self._packed(name.removesuffix(VALUES))
        module, entry = name.removesuffix(WEIGHT), self.checkpoint.entries[name]
        if not name.endswith(WEIGHT) or self._get(module + VALUES):
            return None
        last = module.rpartition(".")[2]
        if len(entry.shape) == 2 and not _EMBEDDING.search(last):
            return self._dense(module, entry)
        if self._get(module + SCALE):
            raise self.checkpoint.error(
                name, f"has a cast_scale, but shape {list(entry.shape)} is no linear weight"
            )
        return None

    def _packed(self, module: str) -> LinearEntry:
        checkpoint, values = self.checkpoint, self.checkpoint.entries[module + VALUES]
        if not self.scheme.format.stored_packed:
            raise checkpoint.error(
                values.name,
                f"is packed, but config.json says {self.scheme.format}; "
                'set its quantization_config format to "packed"',
            )
        if self._get(module + WEIGHT):
            raise checkpoint.error(
                module + WEIGHT, f"is stored dense and as {values.name} too; keep one"
            )
        declared = self.scheme.format is not Format.CT_BITMASK
        if declared and (why := self.scheme.why_left_out(module)):
            raise checkpoint.error(
                values.name, f"is packed, but config.json leaves {module} dense ({why})"
            )
        if len(values.shape) != 2:
            raise checkpoint.error(values.name, f"shape {list(values.shape)} is not [N, K/2]")
        shape = (values.shape[0], values.shape[1] * 2)
        quantized = self.scheme.format.quantized
        self._check_packable(values, shape, (quantized,) if quantized else WEIGHT_DTYPES)
        rows, columns = shape
        expected = {
            BITMASK: (torch.uint8, [[rows, columns // COLUMNS_PER_BYTE]]),
            SHAPE: (torch.int64, [[2], [2, 1]]),
        }
        if quantized:
            expected[ROW_SCALE] = (torch.float32, [[rows, 1]])
        for suffix, (dtype, shapes) in expected.items():
            part = self._get(module + suffix)
            if part is None:
                raise checkpoint.error(
                    values.name,
                    f"has no {module}{suffix} beside it; the checkpoint is incomplete",
                )
            if part.dtype != dtype:
                raise checkpoint.error(
                    part.name, f"dtype {dtype_name(part.dtype)} is not {dtype_name(dtype)}"
                )
            if list(part.shape) not in shapes:
                raise checkpoint.error(
                    part.name,
                    f"shape {list(part.shape)} does not fit {values.name} "
                    f"{list(values.shape)}; expected {' or '.join(map(str, shapes))}",
                )
        dtype = self._dequantized_dtype() if quantized else values.dtype
        return self._entry(module, values, shape, (VALUES, *expected), dtype=dtype)

    def _dequantized_dtype(self) -> torch.dtype:
        dtype = declared_dtype(self.checkpoint.config)
        if dtype is None:
            raise CheckpointError(
                self.checkpoint.path / CONFIG,
                f"says no dtype to dequantize {self.scheme.format} to; set its dtype to one of "
                f"{', '.join(map(dtype_name, WEIGHT_DTYPES))}",
            )
        return dtype

    def _dense(self, module: str, weight: TensorEntry) -> LinearEntry:
        transposed = is_transposed(self.checkpoint.config.get("model_type"), module)
        shape = (weight.shape[1], weight.shape[0]) if transposed else weight.shape[:2]
        scale = self._get(module + SCALE)
        if scale and self.scheme.format is not Format.TRAINING:
            raise self.checkpoint.error(
                scale.name,
                f"belongs to a training checkpoint, config.json says {self.scheme.format}",
            )
        why = self._why_dense(module, weight, shape)
        if scale and why:
            raise self.checkpoint.error(scale.name, f"is on a linear that stays dense: {why}")
        if scale:
            self._check_scale(scale, shape)
        training = self.scheme.format is Format.TRAINING
        if training and not scale and not why and self._has_scales:
            raise self.checkpoint.error(
                weight.name, f"has no {module}{SCALE}, though other linears have; see `ignore`"
            )
        suffixes = (WEIGHT, SCALE) if scale else (WEIGHT,)
        return self._entry(module, weight, shape, suffixes, transposed=transposed, why=why)

    def _why_dense(self, module: str, weight: TensorEntry, shape: tuple[int, ...]) -> str | None:
        """Why `module` stays dense; raises where its format says that it must not."""
        if why := why_by_place(module) or self.scheme.why_left_out(module):
            return why
        if self.scheme.format is Format.CT_BITMASK:
            return "stored dense"
        if self.scheme.format.stored_packed:
            raise self.checkpoint.error(
                weight.name,
                f"is stored dense, but config.json does not ignore it; "
                f"add {module!r} to quantization_config.ignore",
            )
        if self.scheme.format is not Format.PLAIN:
            self._check_packable(weight, shape)
            return None
        if weight.dtype not in WEIGHT_DTYPES:
            return f"dtype {dtype_name(weight.dtype)}"
        return f"K={shape[1]} is not a multiple of 8" if shape[1] % COLUMNS_PER_BYTE else None

    def _check_packable(
        self,
        entry: TensorEntry,
        shape: tuple[int, ...],
        dtypes: tuple[torch.dtype, ...] = WEIGHT_DTYPES,
    ) -> None:
        if entry.dtype not in dtypes:
            known = ", ".join(map(dtype_name, dtypes))
            raise self.checkpoint.error(
                entry.name,
                f"dtype {dtype_name(entry.dtype)} of a 2:4 linear is not "
                f"{'one of ' if dtypes[1:] else ''}{known}",
            )
        try:
            check_shape(shape)
        except ValueError as error:
            raise self.checkpoint.error(
                entry.name, f"{error}, so it cannot be packed; store it dense and in `ignore`"
            ) from error

    def _check_scale(self, scale: TensorEntry, shape: tuple[int, ...]) -> None:
        rows, columns = shape
        if scale.dtype not in WEIGHT_DTYPES:
            raise self.checkpoint.error(
                scale.name, f"dtype {dtype_name(scale.dtype)} is not a floating dtype of weights"
            )
        fits = len(scale.shape) == 2 and scale.shape[0] == rows
        if not fits or not scale.shape[1] or columns % scale.shape[1]:
            raise self.checkpoint.error(
                scale.name,
                f"shape {list(scale.shape)} is not [N, n] with N={rows} and n a divisor "
                f"of K={columns}",
            )

    def _entry(
        self,
        module: str,
        main: TensorEntry,
        shape: tuple[int, ...],
        suffixes: tuple[str, ...],
        *,
        transposed: bool = False,
        why: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LinearEntry:
        tensors = tuple(module + suffix for suffix in suffixes)
        return LinearEntry(
            name=module,
            sparse=why is None,
            shape=(shape[0], shape[1]),
            dtype=dtype or main.dtype,
            tensors=tensors,
            stored_bytes=sum(self.checkpoint.entries[name].nbytes for name in tensors),
            transposed=transposed,
            why_dense=why,
        )

    @property
    def _has_scales(self) -> bool:
        return any(name.endswith(SCALE) for name in self.checkpoint.entries)

    def check_other(self, name: str) -> None:
        """Raise if `name` is a part of a linear whose main tensor is missing."""
        entry = self.checkpoint.entries[name]
        parts = [(BITMASK, VALUES), (SCALE, WEIGHT)]
        if self.scheme.format.quantized:
            parts.append((ROW_SCALE, VALUES))
        for suffix, main in parts:
            if name.endswith(suffix):
                missing = name.removesuffix(suffix) + main
                raise self.checkpoint.error(name, f"has no {missing}; the checkpoint is incomplete")
        if not self.scheme.format.stored_packed:
            return
        module = name.removesuffix(SHAPE)
        if name.endswith(SHAPE):
            raise self.checkpoint.error(
                name, f"has no {module}{VALUES}; the checkpoint is incomplete"
            )
        module = name.removesuffix(BIAS)
        orphan = not self._get(module + WEIGHT) and not self._get(module + VALUES)
        if name.endswith(BIAS) and len(entry.shape) == 1 and orphan and _LAYER_NUMBER.search(name):
            raise self.checkpoint.error(
                name, f"has neither {module}{WEIGHT} nor {module}{VALUES}; incomplete checkpoint"
            )


def declared_dtype(config: dict[str, Any]) -> torch.dtype | None:
    """The dtype of weights that a config.json names, None if it names none."""
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            for dtype in WEIGHT_DTYPES:
                if holder.get(key) == dtype_name(dtype):
                    return dtype
    return None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main_error(checkpoint: Checkpoint, linear: LinearEntry, reason: str) -> CheckpointError:
    """An error about `linear` that names its main tensor."""
    return checkpoint.error(linear.tensors[0], reason)
