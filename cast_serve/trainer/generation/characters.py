"""Where characters begin and end among tokens: byte-level tokenizers spread one over several.

A part of a character decodes to U+FFFD. So does a U+FFFD of the text itself, which is taken for a
part here; it only matters at the ends.
"""

from collections.abc import Callable

Decode = Callable[[list[int]], str]

_PART = "\ufffd"
# A character is at most four bytes of UTF-8, and a token at least one.
_MOST = 4


def first_start(tokens: list[int], decode: Decode) -> int:
    """The place of the first token that begins a character; the end where none does."""
    for place in range(len(tokens)):
        # Of its first one alone a character may still be a part.
        beginnings = (tokens[place : place + length] for length in range(1, _MOST + 1))
        if any(not decode(beginning).startswith(_PART) for beginning in beginnings):
            return place
    return len(tokens)


def whole_end(tokens: list[int], length: int, decode: Decode) -> list[int]:
    """The first `length` tokens, with those that complete a character cut there, or without it."""
    for end in range(length, min(length + _MOST, len(tokens) + 1)):
        if not decode(tokens[:end]).endswith(_PART):
            return tokens[:end]
    return without_part(tokens[:length], decode)


def without_part(tokens: list[int], decode: Decode) -> list[int]:
    """All tokens but those of a last character that was cut; that is up to three."""
    for end in range(len(tokens), max(len(tokens) - _MOST, -1), -1):
        if not decode(tokens[:end]).endswith(_PART):
            return tokens[:end]
    return tokens
