"""Weight scaling (Eq. 11-12): linears of the decoder blocks learn a scale per row and block.

    W_scaled[r, c] = A[r, c // (K/n)] * W[r, c],   y = x @ W_scaled.T

A layer keeps its `weight` (nn.Linear [N, K], GPT-2's Conv1D [K, N]) and its `bias`, and gains
`cast_scale` A [N, n], ones at the start: these are the names of the training checkpoint. The scale
is applied to the weight and not to the output, so folding it is the very same multiplication.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cast_serve.kernels.packing import COLUMNS_PER_BYTE
from cast_serve.trainer.config import Pattern, RunConfig
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.masks import weight_mask
from cast_serve.trainer.sharding import local


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """A linear layer [rows, columns] of the model, and why it stays dense (None: sparsified)."""

    name: str
    rows: int
    columns: int
    dense_because: str | None = None

    @property
    def numel(self) -> int:
        return self.rows * self.columns


class ScaledLayer(nn.Module):
    """What nn.Linear and Conv1D share once they have a scale; `input_dim` is K's dimension.

    `importance`, where masks are not by |w| alone, is what |w| is multiplied with: norms of the
    inputs, in a shape that broadcasts over the weight. It is not in the state dict.
    """

    input_dim: int
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear | Conv1D, *, blocks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight)
        self.register_parameter("bias", layer.bias)
        rows = layer.weight.shape[1 - self.input_dim]
        self.cast_scale = nn.Parameter(layer.weight.new_ones(rows, blocks))
        self.importance: torch.Tensor | None = None

    def scaled_weight(self) -> torch.Tensor:
        """A * W in the layout and dtype of the weight; one multiplication per entry."""
        return scale_weight(self.weight, self.cast_scale, input_dim=self.input_dim)

    def set_importance(self, norms: torch.Tensor) -> None:
        """Choose masks by |w| * norms, fp32 [K], from now on."""
        shape = (1, -1) if self.input_dim == 1 else (-1, 1)
        norms = norms.to(self.weight.device, self.weight.dtype).view(shape)
        # A buffer: it moves with the layer.
        del self.importance
        self.register_buffer("importance", norms, persistent=False)

    @torch.no_grad()
    def current_mask(self, pattern: Pattern) -> torch.Tensor:
        """The mask (Eq. 6) of the weight as it is now, in its layout; of the shard here."""
        # A sharded weight holds whole groups and the rows of its scales (parallel.py).
        weight = local(self.weight.detach())
        ranked = weight if self.importance is None else weight * self.importance
        return weight_mask(ranked, pattern, input_dim=self.input_dim)

    @torch.no_grad()
    def prune_(self, pattern: Pattern) -> None:
        """W <- W * M, in place."""
        local(self.weight.detach()).masked_fill_(~self.current_mask(pattern), 0)

    @torch.no_grad()
    def prune_and_fold_(self, pattern: Pattern) -> None:
        """W <- (W * M) * A and A <- 1, in place: the weight that is served."""
        self.prune_(pattern)
        weight, scale = local(self.weight.detach()), local(self.cast_scale.detach())
        weight.copy_(scale_weight(weight, scale, input_dim=self.input_dim))
        scale.fill_(1)


class ScaledLinear(ScaledLayer):
    """nn.Linear with `cast_scale`; weight [N, K]."""

    input_dim = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.scaled_weight(), self.bias)


class ScaledConv1D(ScaledLayer):
    """GPT-2's Conv1D with `cast_scale`; weight [K, N], so y = x @ W."""

    input_dim = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.scaled_weight().t(), self.bias)


def scale_weight(weight: torch.Tensor, scale: torch.Tensor, *, input_dim: int) -> torch.Tensor:
    """A * W (Eq. 11).

    Args:
        weight: [N, K] with input_dim 1, [K, N] with input_dim 0; K a multiple of n.
        scale: A [N, n].
    """
    blocks = scale.shape[1]
    if input_dim == 1:
        return (weight.unflatten(1, (blocks, -1)) * scale.unsqueeze(2)).flatten(1)
    return (weight.unflatten(0, (blocks, -1)) * scale.t().unsqueeze(1)).flatten(0, 1)


def choose_layers(
    model: PreTrainedModel, pattern: Pattern, *, scaling_blocks: int
) -> list[LayerChoice]:
    """Every linear layer of the model, in order, sparsified or with the reason why not.

    Raises:
        RunError: the model has no list of decoder blocks, or nothing can be sparsified.
    """
    prefix = blocks_name(model) + "."
    # Serving 2:4 needs K % 8 == 0, whatever form the output has.
    multiple = COLUMNS_PER_BYTE if str(pattern) == "2:4" else pattern.group
    choices = []
    for name, module in model.named_modules():
        # Subclasses are routers, adapters and quantized layers: their forward is not x @ W.T alone.
        if type(module) not in (nn.Linear, Conv1D):
            continue
        transposed = type(module) is Conv1D
        rows, columns = module.weight.t().shape if transposed else module.weight.shape
        reason = None
        if not name.startswith(prefix):
            reason = "outside the decoder blocks"
        elif columns % multiple:
            reason = f"K={columns} is not a multiple of {multiple}"
        elif columns % scaling_blocks:
            reason = f"K={columns} is not a multiple of scaling_blocks={scaling_blocks}"
        choices.append(LayerChoice(name=name, rows=rows, columns=columns, dense_because=reason))
    if all(choice.dense_because for choice in choices):
        reasons = sorted({c.dense_because for c in choices if c.dense_because}) or ["no linears"]
        raise RunError(f"{type(model).__name__} has no layer to sparsify: {'; '.join(reasons)}")
    return choices


def layers_of(model: PreTrainedModel, config: RunConfig) -> list[LayerChoice]:
    """choose_layers of a run: method dense leaves all of them as they are.

    Raises:
        RunError: as choose_layers.
    """
    layers = choose_layers(model, config.nm, scaling_blocks=config.scaling_blocks)
    if config.method != "dense":
        return layers
    return [replace(layer, dense_because="method dense") for layer in layers]


def add_scales(model: PreTrainedModel, choices: list[LayerChoice], *, scaling_blocks: int) -> None:
    """Replace every chosen layer by its scaled form, which shares its storage; in place."""
    for choice in choices:
        if choice.dense_because is None:
            layer = model.get_submodule(choice.name)
            assert isinstance(layer, nn.Linear | Conv1D)
            kind = ScaledConv1D if isinstance(layer, Conv1D) else ScaledLinear
            model.set_submodule(choice.name, kind(layer, blocks=scaling_blocks))


def scaled_layers(model: nn.Module) -> Iterator[tuple[str, ScaledLayer]]:
    """(name, layer) of every sparsified layer."""
    for name, module in model.named_modules():
        if isinstance(module, ScaledLayer):
            yield name, module


def optimizer_groups(model: nn.Module) -> list[dict[str, object]]:
    """Parameter groups for AdamS, with names: sparsified weights by layout, and everything else."""
    weights: dict[int, list[nn.Parameter]] = {}
    for _, layer in scaled_layers(model):
        weights.setdefault(layer.input_dim, []).append(layer.weight)
    sparsified = {id(weight) for group in weights.values() for weight in group}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in sparsified]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        {"params": group, "param_names": [names[id(p)] for p in group], "input_dim": input_dim}
        for input_dim, group in (*sorted(weights.items()), (None, rest))
    ]


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder blocks."""
    blocks = model.get_submodule(blocks_name(model))
    assert isinstance(blocks, nn.ModuleList)
    return blocks


@contextmanager
def without_blocks(model: PreTrainedModel) -> Iterator[nn.ModuleList]:
    """Within, `model` is what is outside its blocks, as embedding and head; gives the blocks."""
    name, blocks = blocks_name(model), decoder_blocks(model)
    model.set_submodule(name, nn.Identity())
    try:
        yield blocks
    finally:
        model.set_submodule(name, blocks)


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep one activation a decoder block, and compute the others again in the backward pass."""
    model.gradient_checkpointing_enable({"use_reentrant": False})


def compile_blocks(model: PreTrainedModel) -> None:
    """Run every decoder block through torch.compile: one compilation serves them all.

    Each batch size has its own: evaluation has others than training, and torch.compile would make
    the batch a variable for all that comes after the second one.
    """
    for block in decoder_blocks(model):
        block.compile(dynamic=False)


def blocks_name(model: PreTrainedModel) -> str:
    """Name of the list of decoder blocks: the outermost ModuleList as long as the model is deep."""
    depth = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name
    raise RunError(f"{type(model).__name__} has no list of {depth} decoder blocks to sparsify")
