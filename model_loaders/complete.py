"""Whether every block of a checkpoint has its linears: whole files can still lack tensors."""

import re
from collections.abc import Iterable
from pathlib import Path

from cast_serve.model_loaders.checkpoint import INDEX, SINGLE, Checkpoint
from cast_serve.model_loaders.errors import CheckpointError

# Families whose blocks all hold the same linears, and where config.json says how many there are.
# In others (hybrids, mixtures of experts) a linear may rightly be in some of the blocks only.
_BLOCK_COUNT = {
    **dict.fromkeys(("gemma", "gemma2", "llama", "mistral", "opt"), "num_hidden_layers"),
    **dict.fromkeys(("phi3", "qwen2", "qwen3"), "num_hidden_layers"),
    "gpt2": "n_layer",
}

_IN_BLOCK = re.compile(r"(.*?\.)?(\d+)(\..+)")


def require_all_blocks(checkpoint: Checkpoint, linears: Iterable[str]) -> None:
    """Raise unless each block has every linear that any block has.

    Args:
        linears: module names of the linears found.

    Raises:
        CheckpointError: names the first linear that is missing.
    """
    count_key = _BLOCK_COUNT.get(str(checkpoint.config.get("model_type")))
    if count_key is None:
        return
    stacks: dict[str, dict[str, set[int]]] = {}
    for name in linears:
        if found := _IN_BLOCK.fullmatch(name):
            stack, number, linear = found.groups()
            stacks.setdefault(stack or "", {}).setdefault(linear, set()).add(int(number))
    declared = checkpoint.config.get(count_key)
    for stack, blocks_with in stacks.items():
        count = 1 + max(map(max, blocks_with.values()))
        if isinstance(declared, int):
            count = declared
        for linear, numbers in blocks_with.items():
            for number in range(count):
                if number not in numbers:
                    raise CheckpointError(
                        _listing(checkpoint),
                        "is missing, though other blocks have it; the checkpoint is incomplete",
                        f"{stack}{number}{linear}",
                    )


def _listing(checkpoint: Checkpoint) -> Path:
    """The file that says which tensors there are."""
    for name in (INDEX, SINGLE):
        if (checkpoint.path / name).is_file():
            return checkpoint.path / name
    return checkpoint.path
