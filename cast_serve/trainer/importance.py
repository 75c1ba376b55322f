"""How much the inputs of a layer weigh in its mask: |w| * ||x|| in place of |w| (Eq. 6).

Wanda's metric (arXiv 2306.11695), by which AST (arXiv 2407.20584) also chooses masks in training. A
weight counts by what it adds to the output: one that is large and reads an input near zero is
pruned before a smaller one that reads a large input. The norms are those of the dense model's
inputs on a sample of the training text, measured once; the weights change, and the masks with them.

    OUTPUT.run/importance.safetensors    fp32 [K] of each layer: root mean square over the tokens
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cast_serve.trainer.data import BlockStream
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.layers import LayerChoice, scaled_layers
from cast_serve.trainer.methods.start import calibration_ids
from cast_serve.trainer.oneshot.prune import block_of, collect
from cast_serve.trainer.run_dir import IMPORTANCE


def kept_or_measured(
    run_dir: Path,
    model: PreTrainedModel,
    layers: list[LayerChoice],
    stream: BlockStream,
    *,
    resumed: bool,
) -> dict[str, torch.Tensor]:
    """The norms of a run by layer, fp32 [K] on the CPU; kept, so that a resumed run has the same.

    Args:
        model: dense and untouched, on the device that it is to run on.
        stream: its first 128 sequences are the sample.
        resumed: take what was kept when the run began.

    Raises:
        RunError: an input is not finite, or a layer is never reached; what was kept is damaged, or
            cannot be written.
    """
    path = run_dir / IMPORTANCE
    if resumed and path.is_file():
        return _read(path)
    norms = measure(model, layers, calibration_ids(stream))
    _write(norms, path)
    return norms


@torch.no_grad()
def measure(
    model: PreTrainedModel, layers: list[LayerChoice], ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Root mean square of each input of each sparsified layer over the tokens `ids`, fp32 [K].

    Raises:
        RunError: one of them is not finite, or a layer is never reached.
    """
    names = [layer.name for layer in layers if layer.dense_because is None]
    training = model.training
    model.eval()
    # Not on to the head, whose logits are many times what is asked for.
    squares = collect(model, names, ids, squared=True, until=block_of(names[-1]))
    model.train(training)
    return {name: (square / ids.numel()).sqrt().cpu() for name, square in squares.items()}


def set_importance(model: torch.nn.Module, norms: Mapping[str, torch.Tensor]) -> None:
    """Give every scaled layer of `model` the norms of its inputs; in place."""
    for name, layer in scaled_layers(model):
        layer.set_importance(norms[name])


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"resume: {path} is damaged: {error}; remove it, it is measured again"
        ) from error


def _write(norms: dict[str, torch.Tensor], path: Path) -> None:
    staging = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(norms, staging)
        os.replace(staging, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"output: cannot write {path.parent}: {reason}") from error
