"""Weights that several processes hold together: this rank's shard, and sums over all of them.

Under FSDP2 (`fully_shard`) a parameter is a DTensor, by default cut along dimension 0 into as many
shards of ceil(rows / ranks) rows as there are; the last may be smaller or empty. AdamS works on
the local shards: every weight's update needs no other weight, a mask the others of its group.
"""

from collections.abc import Iterable

import torch
from torch import distributed
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard

from cast_serve.trainer.errors import RunError


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of `tensor`, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def ranks_of(tensor: torch.Tensor) -> ProcessGroup | None:
    """The ranks that hold the shards of `tensor`; None where this one holds all of it."""
    cut = _cut(tensor)
    if cut is None:
        return None
    assert isinstance(tensor, DTensor)
    return tensor.device_mesh.get_group(cut)


def sum_over_ranks(parts: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Sum over all shards of all tensors; the same on every rank that holds any of them.

    Args:
        parts: (tensor, what this rank's shard of it adds to the sum), in one order on all ranks and
            at least one. Values have one shape, dtype and device.
    """
    sums: dict[ProcessGroup | None, torch.Tensor] = {}
    for tensor, value in parts:
        ranks = ranks_of(tensor)
        sums[ranks] = sums[ranks] + value if ranks in sums else value.clone()
    for ranks, value in sums.items():
        if ranks is not None:
            distributed.all_reduce(value, group=ranks)
    return torch.stack([*sums.values()]).sum(0)


def check_groups_whole(tensor: torch.Tensor, *, group: int, input_dim: int, name: str) -> None:
    """Refuse shards that cut groups of the pattern; decided by the whole shape, so on all ranks.

    Args:
        tensor: a weight whose groups of `group` entries run along dimension `input_dim`.

    Raises:
        RunError: names the weight, its shape, the ranks, and what to do.
    """
    cut = _cut(tensor)
    if cut is None:
        return
    assert isinstance(tensor, DTensor)
    place = tensor.placements[cut]
    assert isinstance(place, Shard)
    size, ranks = tensor.shape[input_dim], tensor.device_mesh.size(cut)
    if place.dim != input_dim or -(-size // ranks) % group == 0:
        return
    fitting = [str(n) for n in range(2, ranks) if -(-size // n) % group == 0]
    raise RunError(
        f"{name} {list(tensor.shape)}: {ranks} ranks cut dimension {input_dim} into shards of "
        f"{-(-size // ranks)}, which cuts groups of {group}; "
        + (f"shard over {' or '.join(fitting)} ranks, or " if fitting else "")
        + "keep the weights whole on every rank (DDP)"
    )


def _cut(tensor: torch.Tensor) -> int | None:
    """The dimension of the device mesh over which `tensor` is cut into shards; None: over none.

    Raises:
        RunError: it is cut over several, or not into shards.
    """
    if not isinstance(tensor, DTensor):
        return None
    cuts = [at for at, place in enumerate(tensor.placements) if not place.is_replicate()]
    if not cuts:
        return None
    if len(cuts) == 1 and type(tensor.placements[cuts[0]]) is Shard:
        return cuts[0]
    raise RunError(
        f"AdamS: a parameter {list(tensor.shape)} is placed as {tensor.placements}; it works on "
        "whole parameters and on those cut along one dimension, as by fully_shard"
    )
