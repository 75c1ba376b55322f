"""Which generated texts are worth training on: not seen before, and not a model going in circles.

    Seen before   at least half of a text's windows of 16 tokens, taken every 16, were in texts that
                  were kept; also true of a text that repeats one whole
    In circles    less than half of a text's 4-grams are different ones; of English prose it is more
                  than nine in ten

Windows are remembered by 64-bit digests, about 100 bytes each: 6 bytes a token that was kept.
"""

import hashlib
from array import array
from collections.abc import Sequence
from enum import StrEnum

_WINDOW = 16
_SEEN = 0.5
_GRAM = 4
_DIFFERENT = 0.5


class Verdict(StrEnum):
    """What became of a text."""

    KEPT = "kept"
    SHORT = "too short"
    CIRCLES = "in circles"
    SEEN = "seen before"


class Distinct:
    """Remembers what was kept, and judges the next text by it.

    Args:
        least: tokens that a text must have.
    """

    def __init__(self, *, least: int) -> None:
        self.least = least
        self._windows: set[int] = set()

    def judge(self, tokens: Sequence[int]) -> Verdict:
        """Keep a text, or say why not; tokens are those the model wrote, without its prompt."""
        if len(tokens) < self.least:
            return Verdict.SHORT
        if _different(tokens) < _DIFFERENT:
            return Verdict.CIRCLES
        windows = _windows(tokens)
        seen = sum(window in self._windows for window in windows)
        if windows and seen >= _SEEN * len(windows):
            return Verdict.SEEN
        self._windows.update(windows)
        return Verdict.KEPT


def _different(tokens: Sequence[int]) -> float:
    """Different n-grams as a share of all; 1 for a text too short to have two."""
    grams = [tuple(tokens[i : i + _GRAM]) for i in range(len(tokens) - _GRAM + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _windows(tokens: Sequence[int]) -> list[int]:
    """Digests of the windows of a text that lie side by side, without the rest."""
    starts = range(0, len(tokens) - _WINDOW + 1, _WINDOW)
    return [_digest(tokens[start : start + _WINDOW]) for start in starts]


def _digest(window: Sequence[int]) -> int:
    content = array("q", window).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
