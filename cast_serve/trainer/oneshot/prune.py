"""One-shot pruning of a model in memory: the baselines that CAST's training is measured against.

    magnitude   largest |w|; no data
    wanda       largest |w| * ||x||
    sparsegpt   smallest second-order loss, and an update of what survives

Data-driven methods go through the decoder blocks in order, and a block's inputs come from the
blocks before it as they are after pruning. For each block the calibration text runs through the
model up to that block. With L blocks that is L/2 passes, against 2 if every block's outputs were
kept and fed to the next by hand; but it is right for any architecture, and holds nothing but the
statistics of one block's layers.
"""

from collections.abc import Callable
from itertools import groupby
from typing import Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cast_serve.kernels.pattern import nm_mask
from cast_serve.trainer.config import Pattern
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.layers import LayerChoice, choose_layers
from cast_serve.trainer.oneshot.sparsegpt import prune_sparsegpt_
from cast_serve.trainer.oneshot.wanda import prune_wanda_

Method = Literal["magnitude", "wanda", "sparsegpt"]
METHODS: tuple[Method, ...] = get_args(Method)

# Sequences per forward pass.
_BATCH = 8


class _Done(Exception):
    """The forward pass has come far enough."""


@torch.no_grad()
def prune_oneshot(
    model: PreTrainedModel,
    method: Method,
    pattern: Pattern,
    calibration_ids: torch.Tensor | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[LayerChoice]:
    """Prune every layer that training would sparsify, in place; the same layers are returned.

    Args:
        calibration_ids: int [sequences, context]; magnitude does not look at them.
        progress: called with (blocks done, blocks) after each block.

    Raises:
        RunError: a method that is not known, no calibration text where it is needed, a layer that
            the text does not reach, or activations that are not finite.
    """
    if method not in METHODS:
        raise RunError(f"method: {method!r} is not possible; use {', '.join(METHODS)}")
    if method != "magnitude" and (calibration_ids is None or not calibration_ids.numel()):
        raise RunError(f"method: {method} needs calibration text")
    choices = choose_layers(model, pattern, scaling_blocks=1)
    names = [choice.name for choice in choices if choice.dense_because is None]
    blocks = [(block, list(layers)) for block, layers in groupby(names, key=block_of)]
    training = model.training
    model.eval()
    for done, (block, layers) in enumerate(blocks, start=1):
        if method == "magnitude":
            statistics = dict.fromkeys(layers, torch.empty(0))
        else:
            assert calibration_ids is not None
            squared = method == "wanda"
            statistics = collect(model, layers, calibration_ids, squared=squared, until=block)
        for name in layers:
            _prune(model.get_submodule(name), method, pattern, statistics.pop(name))
        if progress:
            progress(done, len(blocks))
    model.train(training)
    return choices


def _prune(layer: nn.Module, method: Method, pattern: Pattern, statistic: torch.Tensor) -> None:
    assert isinstance(layer.weight, torch.Tensor)
    transposed = isinstance(layer, Conv1D)
    weight = (layer.weight.t() if transposed else layer.weight).float().clone()
    if method == "magnitude":
        weight.masked_fill_(~nm_mask(weight, kept=pattern.kept, group=pattern.group), 0)
    elif method == "wanda":
        prune_wanda_(weight, statistic.sqrt(), pattern)
    else:
        prune_sparsegpt_(weight, statistic, pattern)
    layer.weight.copy_(weight.t() if transposed else weight)


def collect(
    model: PreTrainedModel,
    names: list[str],
    ids: torch.Tensor,
    *,
    squared: bool,
    until: str | None = None,
) -> dict[str, torch.Tensor]:
    """Of each layer's inputs x, over all tokens: sum of x^2 [K] if `squared`, of x x^T [K, K].

    Args:
        until: name of the module after which nothing more is run; None: the whole model is.

    Raises:
        RunError: the text never reaches one of them, or its inputs are not finite.
    """
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            new = x.square().sum(0) if squared else x.t() @ x
            sums[name] = sums[name].add_(new) if name in sums else new

        return add

    def stop(*_: object) -> None:
        raise _Done

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    if until is not None:
        handles.append(model.get_submodule(until).register_forward_hook(stop))
    try:
        for batch in ids.split(_BATCH):
            try:
                model(input_ids=batch.long().to(model.device), use_cache=False)
            except _Done:
                continue
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in names if name not in sums]:
        raise RunError(f"{missing[0]}: the calibration text never reaches it; give more text")
    for name in names:
        if not sums[name].isfinite().all():
            raise RunError(f"{name}: its inputs on the calibration text are not finite")
    return sums


def block_of(name: str) -> str:
    """The decoder block of a layer: model.layers.3 of model.layers.3.mlp.up_proj."""
    parts = name.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdecimal())
    return ".".join(parts[: number + 1])
