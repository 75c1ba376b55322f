"""The state in a training checkpoint, read without the model that it is of."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Every tensor and number of checkpoint-N, whole, by its path such as model.lm_head.weight."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "state.pt"
        dcp_to_torch_save(folder, file)
        state = torch.load(file, weights_only=False)
    return dict(_flat(state))


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return [(path.lstrip("."), value)]
    return [found for key, one in items for found in _flat(one, f"{path}.{key}")]
