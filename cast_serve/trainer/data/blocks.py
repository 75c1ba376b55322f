"""Blocks of `context` tokens, cut from a token stream and read through its memory map."""

import torch

from cast_serve.trainer.data.tokens import TokenRun
from cast_serve.trainer.errors import RunError


class Blocks:
    """Some blocks of a stream: `rows`, int64, are their numbers in it. blocks[i] is [context]."""

    def __init__(self, tokens: TokenRun, *, context: int, rows: torch.Tensor) -> None:
        self._tokens = tokens
        self._context = context
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        start = int(self._rows[index]) * self._context
        return self._tokens.read(start, start + self._context)

    def part(self, chosen: torch.Tensor) -> "Blocks":
        """Those that `chosen` (bool or int64 index) picks."""
        return Blocks(self._tokens, context=self._context, rows=self._rows[chosen])

    def stacked(self) -> torch.Tensor:
        """int32 [blocks, context] of all, in memory."""
        found = torch.empty(len(self), self._context, dtype=torch.int32)
        for place in range(len(self)):
            found[place] = self[place]
        return found


def to_blocks(tokens: TokenRun, *, context: int, key: str) -> Blocks:
    """All blocks of `tokens`, without the rest; RunError if there is not one."""
    count = len(tokens) // context
    if not count:
        raise RunError(
            f"{key}: {len(tokens)} tokens are less than one block of context={context}; "
            "add text or lower context"
        )
    return Blocks(tokens, context=context, rows=torch.arange(count))


def held_out_rows(blocks: int, share: float) -> torch.Tensor:
    """bool [blocks]: every (1/share)-th, so that each part of the text has a share in it."""
    index = torch.arange(blocks + 1, dtype=torch.float64).mul(share).floor()
    return index.diff() > 0
