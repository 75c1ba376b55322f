"""A trained model to the folder that is served.

    training   dense weights and X.cast_scale, unpruned; HF names
    packed     2:4 values and bitmasks, scales folded; model_loaders writes it
    dense      zeros stored, scales folded; for N:M other than 2:4 an ordinary HF checkpoint

The folder is written beside its final name and renamed at the end. GPT-2's Conv1D keeps HF's
layout in the training form: weight [in, out], cast_scale [out, n].
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.layers import scaled_layers
from cast_serve.trainer.source import copy_companions, read_config

# In a run's folder, while its output is written.
TRAINING_FORM = "training-form"
_FORMAT_VERSION = 1


def write_training_form(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    source: Path,
    target: Path,
    *,
    pattern: str,
    ignore: list[str],
) -> None:
    """Write a model whose layers have scales to the new folder `target` as it is in training.

    Args:
        weights: its whole state dict, which `model` itself may not hold.
        source: the dense checkpoint, whose config.json, tokenizer and licence are kept.
        ignore: linear layers that stay dense.
    """
    _save_weights(model, weights, target)
    # The source's own config: transformers adds its defaults to the one in memory.
    quantization = {
        "quant_method": "cast",
        "format": "training",
        "sparsity": pattern,
        "ignore": ignore,
        "version": _FORMAT_VERSION,
    }
    _write_config(source, target, torch.float32, {"quantization_config": quantization})
    copy_companions(source, target)


def prune_and_fold_(model: nn.Module, config: RunConfig) -> None:
    """W <- (W * M_T) * A in every sparsified layer, in place: the model that is served, in fp32."""
    for _, layer in scaled_layers(model):
        layer.prune_and_fold_(config.nm)


def publish(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    training_form: Path,
    config: RunConfig,
    *,
    dtype: torch.dtype,
    provenance: dict[str, Any],
) -> None:
    """Write config.output in config.export_form, whole or not at all.

    Args:
        weights: whole state dict of the model, pruned and folded; written only where the training
            form is not converted.
        training_form: folder of write_training_form.
        dtype: of the packed or dense weights.
    """
    # Where a link leads: it stays, and what is renamed must be of one disk.
    output = config.output.resolve()
    staging = output.with_name(f".{output.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    if config.export_form == "training":
        shutil.copytree(training_form, staging)
        _write_json(staging / "cast.json", provenance)
    elif config.converts:
        from cast_serve.model_loaders.convert import convert

        convert(training_form, staging, to=config.export_form, dtype=dtype, provenance=provenance)
    else:
        write_dense(model, weights, config.model, staging, dtype)
        _write_json(staging / "cast.json", provenance)
    _replace(staging, output)


def write_dense(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    source: Path,
    target: Path,
    dtype: torch.dtype,
) -> None:
    """An ordinary HF checkpoint of the pruned and folded model: stock names, no extra tensors."""
    stock = {
        name: tensor.to(dtype)
        for name, tensor in weights.items()
        if not name.endswith(".cast_scale")
    }
    _save_weights(model, stock, target)
    _write_config(source, target, dtype, {})
    copy_companions(source, target)


def _save_weights(model: PreTrainedModel, weights: dict[str, torch.Tensor], target: Path) -> None:
    """Write `weights` under their stock names, each tied one once."""
    untied = {name: one for name, one in weights.items() if name not in model.all_tied_weights_keys}
    # transformers reads generation defaults that it refuses to write, such as Llama 2's temperature
    # without do_sample. What is kept of them is the source's file.
    model.generation_config = GenerationConfig()
    model.save_pretrained(target, state_dict=untied)
    (target / GENERATION_CONFIG_NAME).unlink(missing_ok=True)


def _write_config(source: Path, target: Path, dtype: torch.dtype, extra: dict[str, Any]) -> None:
    config = read_config(source)
    # transformers 4 wrote torch_dtype; with both, readers disagree on which one holds.
    config.pop("torch_dtype", None)
    _write_json(target / "config.json", config | {"dtype": dtype_name(dtype)} | extra)


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16, as config.json has it."""
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _replace(staging: Path, output: Path) -> None:
    """Rename `staging` to `output`; one that a resumed run wrote before is replaced."""
    if output.is_dir():
        old = output.with_name(f".{output.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(output, old)
        os.replace(staging, output)
        shutil.rmtree(old)
    else:
        os.replace(staging, output)
