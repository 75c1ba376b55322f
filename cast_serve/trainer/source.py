"""The dense checkpoint a run starts from: model, tokenizer, and the files a copy of it needs."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from cast_serve.trainer.config import DEFAULT_CONTEXT
from cast_serve.trainer.errors import RunError, first_line
from cast_serve.trainer.layers import blocks_name

# What transformers raises for files that it can make no model or tokenizer of.
LOADING_ERRORS = (
    *(OSError, ValueError, LookupError, RuntimeError, SafetensorError, StrictDataclassError),
    # It computes with a config's numbers, and looks up its names, before it asks what they are.
    *(ArithmeticError, AssertionError, AttributeError, TypeError),
)

# Of a folder with a tokenizer that transformers reads, one at least.
_TOKENIZERS = ("tokenizer*.json", "vocab*", "*.model", "*.tiktoken", "tekken.json")
_COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "LICENSE*",
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A loaded dense checkpoint.

    Attributes:
        model: fp32 master weights, whatever the files hold.
        dtype: floating dtype of the files, which an export with dtype=auto gets.
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype

    def output_dtype(self, asked: str) -> torch.dtype:
        """Of the packed or dense output: "auto" is that of the files."""
        return self.dtype if asked == "auto" else getattr(torch, asked)


def load_source(folder: Path) -> Source:
    """Load a local Hugging Face causal language model.

    Raises:
        RunError: no such folder, no config, already quantized or sparse, damaged or unknown.
    """
    config = read_config(folder)
    quantization = config.get("quantization_config")
    # null is how some tools write that there is none.
    if quantization is not None:
        known = isinstance(quantization, dict)
        method = quantization.get("quant_method", "unknown") if known else "unknown"
        raise RunError(
            f"model: {folder} is quantized or sparse already (quant_method {method}); "
            "give the dense checkpoint it was made from"
        )
    tokenizer = load_tokenizer(folder)
    with loading(folder):
        # dtype="auto" reads the files' own, which from_pretrained(dtype=float32) would hide.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, output_loading_info=True
        )
    model, found = loaded
    require_whole(folder, model, found)
    dtype = model.dtype
    return Source(folder=folder, model=model.float(), tokenizer=tokenizer, dtype=dtype)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """That of a local checkpoint.

    Raises:
        RunError: the folder has none, or one that transformers cannot read.
    """
    if not any(next(folder.glob(name), None) for name in _TOKENIZERS):
        raise RunError(
            f"model: {folder} holds no tokenizer, neither {' nor '.join(_TOKENIZERS)}; copy the "
            "files that belong to the model"
        )
    with loading(folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def weights_sha256(model: PreTrainedModel) -> str:
    """Of names, shapes and, for each tensor, the exact sum of its words: the same on any device."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        words = weight.detach().float().view(torch.int32).sum(dtype=torch.int64).item()
        digest.update(f"{name} {tuple(weight.shape)} {words}\n".encode())
    return digest.hexdigest()


def dense_sha256(source: Source) -> str:
    """Of what a run starts from and learns from, still dense: weights and config.json."""
    config = (source.folder / "config.json").read_bytes()
    return hashlib.sha256(weights_sha256(source.model).encode() + config).hexdigest()


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Where transformers reads `folder`.

    Raises:
        RunError: it cannot, in the first line of its own words.
    """
    try:
        yield
    except LOADING_ERRORS as error:
        raise RunError(f"model: cannot load {folder}: {first_line(error)}") from error


def load_empty_source(folder: Path, dtype: torch.dtype) -> Source:
    """As load_source, with weights that hold nothing yet: another process has them.

    Memory is only taken once they are written to.
    """
    tokenizer = load_tokenizer(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # no_init_weights leaves this out, too.
    model.tie_weights()
    return Source(folder=folder, model=model, tokenizer=tokenizer, dtype=dtype)


def require_whole(folder: Path, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Refuse weights that transformers made up or left out, or that cannot be trained from.

    Args:
        found: what transformers says of loading.

    Raises:
        RunError: names a weight.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for what in ("missing_keys", "mismatched_keys"):
        names = {key if isinstance(key, str) else key[0] for key in found[what]} - tied
        if names:
            raise RunError(
                f"model: {folder} is incomplete: {min(names)} is "
                f"{'missing' if what == 'missing_keys' else 'of another shape than the model'}"
            )
    if left_out := _of_blocks(model, found["unexpected_keys"]):
        raise RunError(
            f"model: {folder} holds {min(left_out)}, which the model of its config.json does not "
            "have; give the config.json that belongs to the weights"
        )
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise RunError(f"model: {folder}: {name} holds a NaN or an infinity")


def _of_blocks(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Those of `names` that are weights of decoder blocks.

    Others are of parts that this model has no use for, or buffers that older releases wrote.
    """
    weights = [name for name in names if name.endswith(".weight")]
    if not weights:
        return []
    blocks = blocks_name(model) + "."
    # Some checkpoints leave out the model's own prefix (GPT-2: `h.0` for `transformer.h.0`).
    short = blocks.removeprefix(f"{model.base_model_prefix}.")
    return [name for name in weights if name.startswith((blocks, short))]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint as it is on disk.

    Raises:
        RunError: it is missing or not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise RunError(
            f"model: {folder} holds no config.json; give a local Hugging Face checkpoint folder"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"model: {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise RunError(f"model: {path} must hold a JSON object")
    return config


def context_length(
    model: PreTrainedModel, asked: int | None, *, default: int = DEFAULT_CONTEXT
) -> int:
    """Tokens per sequence: what was asked, or `default`, within the model's positions.

    Raises:
        RunError: more than the model has positions for.
    """
    # OPT and others without a limit in their config take any length.
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return min(default, limit or default)
    if limit is not None and asked > limit:
        raise RunError(f"context: {asked} is more than the model's {limit} positions")
    return asked


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, generation defaults, chat template and licence; not weights nor config."""
    for pattern in _COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, target / path.name)
