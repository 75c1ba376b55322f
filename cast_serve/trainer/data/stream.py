"""The sequences of a run in order, and batches of them."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from cast_serve.trainer.data.mixture import Mixture
from cast_serve.trainer.data.packing import document_positions


class Rows(Protocol):
    """int [context] tokens by number: Blocks, or an int tensor [blocks, context]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> torch.Tensor: ...


class BlockStream(Dataset[dict[str, torch.Tensor]]):
    """The sequences of a whole run: of each part, epoch after epoch in its own permutation.

    Item i depends on the parts, the shares, the seed and i alone: not on what was asked for before,
    so a resumed run reads on exactly where it stopped, and processes may share out the items.
    """

    def __init__(
        self,
        *parts: Rows,
        length: int,
        seed: int,
        shares: Sequence[float] | None = None,
        eos: int | None = None,
    ) -> None:
        """`shares` of several parts sum to 1; with `eos`, items have position_ids per document."""
        assert len(parts) == (1 if shares is None else len(shares)), "a share for each part"
        self._parts = parts
        self._length = length
        self._seed = seed
        self._eos = eos
        self._mixture = None if shares is None else Mixture(shares, length=length, seed=seed)
        # Of each part, the epoch that was last read and its permutation.
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self._length:
            raise IndexError(f"item {index} of a run of {self._length}")
        number, place = (0, index) if self._mixture is None else self._mixture[index]
        epoch, place = divmod(place, len(self._parts[number]))
        ids = self._parts[number][int(self._order(number, epoch)[place])].long()
        if self._eos is None:
            return {"input_ids": ids}
        return {"input_ids": ids, "position_ids": document_positions(ids, eos=self._eos)}

    def _order(self, number: int, epoch: int) -> np.ndarray:
        known = self._orders.get(number)
        if known is not None and known[0] == epoch:
            return known[1]
        # Not torch.Generator: on the CPU it takes 32 bits of its seed alone.
        draw = np.random.default_rng((self._seed, number, epoch))
        order = draw.permutation(len(self._parts[number]))
        self._orders[number] = epoch, order
        return order


def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack items: input_ids and, where items have them, position_ids, int64 [batch, context]."""
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}
