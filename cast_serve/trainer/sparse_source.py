"""A 2:4 checkpoint of any form that is read, as a transformers model with its masks."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cast_serve.model_loaders.checkpoint import Checkpoint, read_json
from cast_serve.model_loaders.formats import SPARSITY
from cast_serve.model_loaders.layers import WEIGHT, is_transposed
from cast_serve.model_loaders.rewrite import kept_slots
from cast_serve.model_loaders.write import PROVENANCE
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.from_weights import build_model, unpacked


@dataclass(frozen=True, kw_only=True)
class SparseSource:
    """A loaded 2:4 checkpoint.

    Attributes:
        model: fp32 weights, whatever the files hold; pruned entries are zero.
        masks: by module name in the model, the slots that the pattern keeps, bool in the layout
            of the weight. A kept weight may be zero: the mask is the stored bitmask, not `!= 0`.
        names: of every tensor in the checkpoint that the model has, its parameter or buffer.
        dtype: of the sparse linears in the files (of 8-bit ones: what they are dequantized to).
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    masks: dict[str, torch.Tensor]
    names: dict[str, str]
    dtype: torch.dtype

    def sparse_modules(self) -> list[tuple[nn.Module, torch.Tensor]]:
        """(module, mask) of every sparse linear."""
        return [(self.model.get_submodule(name), mask) for name, mask in self.masks.items()]


def load_sparse(folder: Path) -> SparseSource:
    """Load a local 2:4 checkpoint.

    Raises:
        CheckpointError: the checkpoint is bad.
        RunError: nothing in it is 2:4, or transformers cannot make the model of it.
    """
    checkpoint = Checkpoint.open(folder)
    weights: dict[str, torch.Tensor] = {}
    bitmasks: dict[str, torch.Tensor] = {}
    dtypes: list[torch.dtype] = []
    for name, tensor, packed in unpacked(checkpoint):
        weights[name] = tensor
        if packed is not None:
            kept = kept_slots(packed)
            transposed = is_transposed(checkpoint.config.get("model_type"), packed.name)
            bitmasks[name] = kept.t() if transposed else kept
            dtypes.append(packed.values.dtype)
    if not bitmasks:
        raise RunError(
            f"model: {folder} has no 2:4 layer; prune it first: cast-train or `cast-model prune`"
        )
    model, tokenizer = build_model(folder, weights)
    names = _match(folder, model, weights)
    masks = {names[name].removesuffix(WEIGHT): kept for name, kept in bitmasks.items()}
    return SparseSource(
        folder=folder,
        model=model.float(),
        tokenizer=tokenizer,
        masks=masks,
        names=names,
        dtype=dtypes[0],
    )


def require_two_of_four(folder: Path) -> None:
    """Refuse what was made to another pattern: a 1:4 layer is 2:4, too, until it is trained.

    Raises:
        RunError: it was, by its cast.json.
    """
    record = folder / PROVENANCE
    pattern = read_json(record, "").get("sparsity", SPARSITY) if record.is_file() else SPARSITY
    if pattern != SPARSITY:
        raise RunError(
            f"model: {folder} is {pattern}, by its {PROVENANCE}; what keeps a pattern here is "
            f"for {SPARSITY} alone"
        )


def _match(
    folder: Path, model: PreTrainedModel, weights: dict[str, torch.Tensor]
) -> dict[str, str]:
    """Name in the model of each tensor of the checkpoint that the model has.

    Some checkpoints leave out the model's own prefix (GPT-2: `h.0` for `transformer.h.0`).
    """
    state = model.state_dict()
    names = {}
    for name, tensor in weights.items():
        prefixed = f"{model.base_model_prefix}.{name}"
        found = next((known for known in (name, prefixed) if known in state), None)
        if found is not None and state[found].shape == tensor.shape:
            names[name] = found
        elif name.endswith(".weight"):
            raise RunError(f"model: {folder}: {name} is not in {type(model).__name__}")
    return names
