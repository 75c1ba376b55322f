"""Whether a checkpoint holds every tensor its model has: whole files can still lack some.

vLLM itself checks that only where a checkpoint has no quantization_config.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from cast_serve.model_loaders.checkpoint import INDEX, SINGLE, Checkpoint
from cast_serve.model_loaders.errors import CheckpointError

# Families whose blocks all hold the same tensors, and where config.json says how many there are.
# In others (hybrids, mixtures of experts) a tensor may rightly be in some of the blocks only.
_BLOCK_COUNT = {
    **dict.fromkeys(("gemma", "gemma2", "llama", "mistral", "opt"), "num_hidden_layers"),
    **dict.fromkeys(("phi3", "qwen2", "qwen3"), "num_hidden_layers"),
    "gpt2": "n_layer",
}
# Tensors outside the blocks, by the end of their names.
_OUTSIDE = {
    "gpt2": ("wte.weight", "wpe.weight"),
    "opt": ("embed_tokens.weight", "embed_positions.weight"),
}
_OUTSIDE_DEFAULT = ("embed_tokens.weight", "norm.weight")

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
    outside = list(_OUTSIDE.get(family, _OUTSIDE_DEFAULT))
    if checkpoint.config.get("tie_word_embeddings") is False:
        outside.append("lm_head.weight")
    for end in outside:
        if not any(name.endswith(end) for name in checkpoint.entries):
            raise CheckpointError(
                _listing(checkpoint), "is missing; the checkpoint is incomplete", end
            )


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
