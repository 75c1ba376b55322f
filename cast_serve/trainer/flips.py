"""Mask flips: the share of a group's mask entries that its last refresh changed.

A group of an optimizer holds it under "flips", None before it is known, else as a tensor on the
group's device: nothing waits for a refresh before somebody asks.
"""

from collections.abc import Sequence
from typing import Any


def of_all(groups: Sequence[dict[str, Any]]) -> float | None:
    """Over the weights of all groups that know theirs; None if none does. Waits for the device."""
    counts = [
        (float(group["flips"]), sum(weight.numel() for weight in group["params"]))
        for group in groups
        if group["flips"] is not None
    ]
    total = sum(count for _, count in counts)
    return sum(flips * count for flips, count in counts) / total if total else None


def as_numbers(state_dict: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with plain numbers in place of those tensors."""
    for group in state_dict["param_groups"]:
        if group["flips"] is not None:
            group["flips"] = float(group["flips"])
    return state_dict
