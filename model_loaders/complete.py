"""Whether a checkpoint holds every tensor its model has: whole files can still lack some.

vLLM itself checks that only where a checkpoint has no quantization_config.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cast_serve.model_loaders.checkpoint import INDEX, SINGLE, Checkpoint
from cast_serve.model_loaders.errors import CheckpointError

# Families whose blocks all hold the same tensors, and where config.json says how many there are.
# In others (hybrids, mixtures of experts) a tensor may rightly be in some of the blocks only.
_BLOCK_COUNT = {
    **dict.fromkeys(("gemma", "gemma2", "llama", "mistral", "opt"), "num_hidden_layers"),
    **dict.fromkeys(("phi3", "qwen2", "qwen3"), "num_hidden_layers"),
    "gpt2": "n_layer",
}
# Those whose head is a matrix of its own where config.json does not say: transformers' defaults.
_UNTIED = frozenset({"llama", "mistral", "phi3", "qwen2", "qwen3"})
# Ends of the names of architectures that predict tokens; others have no use for an lm_head.
_PREDICT_TOKENS = ("ForCausalLM", "LMHeadModel")

_IN_BLOCK = re.compile(r"(.*?\.)?(\d+)(\..+)")

Shape = tuple[int, ...]


def require_complete(checkpoint: Checkpoint, shapes: Mapping[str, Shape]) -> None:
    """Raise unless each block has what any block has, in one shape, and the rest is there.

    Args:
        shapes: of every linear (N, K) by module name, and of every other tensor.

    Raises:
        CheckpointError: names the first tensor that is missing or differs.
    """
    family = str(checkpoint.config.get("model_type"))
    if family not in _BLOCK_COUNT:
        return
    _require_blocks(checkpoint, shapes, checkpoint.config.get(_BLOCK_COUNT[family]))
    for end in _outside_blocks(family, checkpoint.config):
        if not _holds(shapes, end):
            raise CheckpointError(
                _listing(checkpoint), "is missing; the checkpoint is incomplete", end
            )


def _holds(shapes: Mapping[str, Shape], end: str) -> bool:
    """Whether a tensor is `end` below any prefix, or a linear has that for its weight."""
    # norm.weight is no end of input_layernorm.weight.
    ends = (f".{end}", f".{end.removesuffix('.weight')}")
    return any(f".{name}".endswith(ends) for name in shapes)


def _outside_blocks(family: str, config: Mapping[str, Any]) -> list[str]:
    """What is outside the blocks, by the ends of its names: prefixes differ by architecture."""
    if family == "gpt2":
        names = ["wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"]
    elif family == "opt":
        names = ["embed_tokens.weight", "embed_positions.weight", *_opt_norm(config)]
        hidden = config.get("hidden_size")
        if hidden is not None and config.get("word_embed_proj_dim") not in (None, hidden):
            names += ["project_in.weight", "project_out.weight"]
    else:
        names = ["embed_tokens.weight", "norm.weight"]
    return [*names, "lm_head.weight"] if _has_head(family, config) else names


def _opt_norm(config: Mapping[str, Any]) -> list[str]:
    """The final norm of an OPT, which need not have one, nor weights in it."""
    weighs = config.get("layer_norm_elementwise_affine", True)
    kept = not config.get("_remove_final_layer_norm", False)
    if not (config.get("do_layer_norm_before", True) and kept and weighs):
        return []
    # Each block has a final_layer_norm as well.
    return ["decoder.final_layer_norm.weight", "decoder.final_layer_norm.bias"]


def _has_head(family: str, config: Mapping[str, Any]) -> bool:
    """Whether the model multiplies by a head that is not its embeddings."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        # vLLM takes what predicts tokens, then.
        architectures = [_PREDICT_TOKENS[0]]
    if not any(str(name).endswith(_PREDICT_TOKENS) for name in architectures):
        return False
    return not config.get("tie_word_embeddings", family not in _UNTIED)


def _require_blocks(checkpoint: Checkpoint, shapes: Mapping[str, Shape], declared: object) -> None:
    stacks: dict[str, dict[str, dict[int, Shape]]] = {}
    for name, shape in shapes.items():
        if found := _IN_BLOCK.fullmatch(name):
            stack, number, tensor = found.groups()
            stacks.setdefault(stack or "", {}).setdefault(tensor, {})[int(number)] = shape
    for stack, tensors in stacks.items():
        count = 1 + max(map(max, tensors.values()))
        if isinstance(declared, int):
            count = declared
        for tensor, blocks in tensors.items():
            usual = max(blocks.values(), key=list(blocks.values()).count)
            for number in range(count):
                name = f"{stack}{number}{tensor}"
                if number not in blocks:
                    raise CheckpointError(
                        _listing(checkpoint),
                        "is missing, though other blocks have it; the checkpoint is incomplete",
                        name,
                    )
                if blocks[number] != usual:
                    raise CheckpointError(
                        _listing(checkpoint),
                        f"has shape {list(blocks[number])}, in other blocks it is {list(usual)}",
                        name,
                    )


def _listing(checkpoint: Checkpoint) -> Path:
    """The file that says which tensors there are."""
    for name in (INDEX, SINGLE):
        if (checkpoint.path / name).is_file():
            return checkpoint.path / name
    return checkpoint.path
