"""Which format a config.json declares, and which modules it claims are 2:4."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from cast_serve.model_loaders.errors import CheckpointError

QUANT_METHOD = "cast"
COMPRESSED_TENSORS = "compressed-tensors"
SPARSITY = "2:4"
VERSION = 1

# Among names of modules: a regular expression, and the class of all linears.
PATTERN, CLASS = "re:", "Linear"


class Format(StrEnum):
    """How the sparse linears are stored."""

    PACKED = "packed"
    PACKED_FP8 = "packed-fp8"
    PACKED_INT8 = "packed-int8"
    DENSE = "dense"
    TRAINING = "training"
    CT_BITMASK = "compressed-tensors sparse-24-bitmask"
    CT_DENSE = "compressed-tensors dense"
    # No quantization_config: dense-stored 2:4 if the weights say so, with --quantization cast.
    PLAIN = "plain"

    @property
    def stored_packed(self) -> bool:
        return self in (Format.PACKED, Format.CT_BITMASK) or self.quantized is not None

    @property
    def quantized(self) -> torch.dtype | None:
        """dtype of 8-bit values that have a scale per output channel; None: values are weights."""
        return _QUANTIZED.get(self)


_QUANTIZED = {Format.PACKED_FP8: torch.float8_e4m3fn, Format.PACKED_INT8: torch.int8}
_OURS = {
    str(format_): format_ for format_ in (Format.PACKED, Format.DENSE, Format.TRAINING, *_QUANTIZED)
}
_SPARSITY_FORMATS = {"sparse-24-bitmask": Format.CT_BITMASK, "dense": Format.CT_DENSE}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A format and the modules it leaves out.

    Attributes:
        ignore: module names, class names ("Linear") and `re:` patterns that stay dense.
        targets: the same for what is sparse.
    """

    format: Format
    ignore: tuple[str, ...] = ()
    targets: tuple[str, ...] = (CLASS,)

    def why_left_out(self, module: str) -> str | None:
        """Why linear `module` stays dense by the words of the config; None if it does not."""
        for pattern in self.ignore:
            if _matches(pattern, module):
                return f"in ignore ({pattern})" if pattern.startswith(PATTERN) else "in ignore"
        if not any(_matches(pattern, module) for pattern in self.targets):
            return "not in targets"
        return None


def method_of(declared: Mapping[str, Any]) -> str:
    """quant_method of a quantization_config as it is compared: in lower case and with dashes."""
    return str(declared.get("quant_method", "")).lower().replace("_", "-")


def recognise(config: dict[str, Any], file: Path) -> Scheme:
    """The scheme that the config.json `config` declares.

    Args:
        config: the whole config.json.
        file: where it was read, for errors.

    Raises:
        CheckpointError: another quantization method, an unknown format, version or sparsity, or a
            compressed-tensors checkpoint that is not 2:4 or is quantized as well.
    """
    declared = _quantization_config(config)
    if declared is None:
        return Scheme(format=Format.PLAIN)
    if not isinstance(declared, dict):
        raise CheckpointError(file, "quantization_config is not a JSON object")
    method = method_of(declared)
    if method == QUANT_METHOD:
        return _ours(declared, file)
    if method == COMPRESSED_TENSORS:
        return _compressed_tensors(declared, file)
    raise CheckpointError(
        file,
        f"quant_method {declared.get('quant_method')!r} is not read; "
        f'only "{QUANT_METHOD}" and 2:4 "{COMPRESSED_TENSORS}" are; serve it with `vllm serve`',
    )


def _quantization_config(config: dict[str, Any]) -> Any:
    """Looked up where vLLM looks: a multimodal config has it under text_config."""
    for holder in (config, config.get("text_config")):
        if isinstance(holder, dict):
            for key in ("quantization_config", "compression_config"):
                if holder.get(key) is not None:
                    return holder[key]
    return None


def _ours(declared: dict[str, Any], file: Path) -> Scheme:
    version, stored, sparsity = (declared.get(key) for key in ("version", "format", "sparsity"))
    if version != VERSION or isinstance(version, bool):
        raise CheckpointError(
            file,
            f"quantization_config version {version!r} is not {VERSION}; "
            "it needs another release of cast-serve",
        )
    if not isinstance(stored, str) or stored not in _OURS:
        raise CheckpointError(
            file, f"quantization_config format {stored!r} is not one of {', '.join(_OURS)}"
        )
    if sparsity != SPARSITY:
        raise CheckpointError(
            file,
            f'quantization_config sparsity {sparsity!r} cannot be served; only "2:4" can: '
            "train or prune with --pattern 2:4",
        )
    return Scheme(format=_OURS[stored], ignore=_names(declared, "ignore", file))


def _compressed_tensors(declared: dict[str, Any], file: Path) -> Scheme:
    sparsity = declared.get("sparsity_config")
    if not isinstance(sparsity, dict) or not sparsity:
        raise CheckpointError(
            file,
            "compressed-tensors without a sparsity_config is not 2:4; "
            "serve it with vLLM's own compressed-tensors",
        )
    structure, stored = sparsity.get("sparsity_structure"), sparsity.get("format")
    if structure != SPARSITY:
        raise CheckpointError(
            file,
            f'sparsity_structure {structure!r} cannot be served; only "2:4" can: '
            "decompress it and serve it dense with `vllm serve`",
        )
    if not isinstance(stored, str) or stored not in _SPARSITY_FORMATS:
        raise CheckpointError(
            file,
            f"sparsity_config format {stored!r} is not one of {', '.join(_SPARSITY_FORMATS)}",
        )
    if reason := _why_quantized(declared):
        raise CheckpointError(
            file,
            f"is 2:4 and quantized as well ({reason}); only unquantized 2:4 is read, "
            "which `cast-model quantize` turns into 8 bits",
        )
    targets = _names(sparsity, "targets", file) or (CLASS,)
    ignore = _names(sparsity, "ignore", file)
    return Scheme(format=_SPARSITY_FORMATS[stored], ignore=ignore, targets=targets)


def _why_quantized(declared: dict[str, Any]) -> str | None:
    if declared.get("kv_cache_scheme"):
        return "kv_cache_scheme"
    groups = declared.get("config_groups") or {}
    if not isinstance(groups, dict):
        return "config_groups"
    for name, group in groups.items():
        for part in ("weights", "input_activations", "output_activations"):
            if isinstance(group, dict) and (scheme := group.get(part)):
                kind = scheme if isinstance(scheme, dict) else {}
                bits, type_ = kind.get("num_bits", "?"), kind.get("type", "?")
                return f"config_groups.{name}.{part}: {bits}-bit {type_}"
    return None


def _names(declared: dict[str, Any], key: str, file: Path) -> tuple[str, ...]:
    names = declared.get(key)
    if names is None:
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(file, f"{key} {names!r} is not a list of module names")
    for name in names:
        if name.startswith(PATTERN):
            try:
                re.compile(name.removeprefix(PATTERN))
            except re.error as error:
                raise CheckpointError(
                    file, f"{key} has the pattern {name!r}, which is no regular expression: {error}"
                ) from error
    return tuple(names)


def _matches(pattern: str, module: str) -> bool:
    """As compressed-tensors matches: `re:` from the start of the name, else name or class."""
    if pattern.startswith(PATTERN):
        return re.match(pattern.removeprefix(PATTERN), module) is not None
    return pattern in (module, CLASS)
