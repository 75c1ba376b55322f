"""Token streams: written to a .npy file batch by batch, read through a memory map, digested.

    tokens   uint16 where the vocabulary fits, else int32; [tokens], EOS after each document
    digests  SHA-256 of each CHUNK tokens as little-endian int32; the last one may be shorter

With a digest per chunk the digest of any prefix is known after reading one chunk at most.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import IO

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from cast_serve.trainer.data.files import Piece
from cast_serve.trainer.errors import RunError

CHUNK = 1 << 20
# Pieces and characters a call of the tokenizer: enough for all its threads.
_BATCH = 1024
_BATCH_CHARACTERS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a finished token file holds; `complete` if its source ended before the limit."""

    tokens: int
    complete: bool
    digests: tuple[str, ...]


def end_of_document(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that follows each document.

    Raises:
        RunError: the tokenizer has no EOS.
    """
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise RunError("model: its tokenizer has no EOS token to separate documents; set eos_token")
    return eos


def write_tokens(
    file: IO[bytes],
    pieces: Iterable[Piece],
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None,
    name: str,
) -> Written:
    """Tokenise `pieces` into an empty, seekable file as .npy; stop at `limit` tokens exactly.

    Raises:
        RunError: from reading `pieces`.
        OSError: the file cannot be written.
    """
    dtype = np.dtype("<u2" if max(tokenizer.get_vocab().values()) < 1 << 16 else "<i4")
    digest = ChunkDigest()
    _write_header(file, dtype, 0)
    complete = True
    # disable=None: no bar where stderr is no terminal.
    with tqdm(desc=f"tokenising {name}", unit=" tokens", unit_scale=True, disable=None) as bar:
        for batch in _batches(pieces):
            tokens = _encode(batch, tokenizer)
            if limit is not None and digest.tokens + len(tokens) >= limit:
                tokens, complete = tokens[: limit - digest.tokens], False
            digest.update(tokens)
            file.write(tokens.astype(dtype).tobytes())
            bar.update(len(tokens))
            if not complete:
                break
    file.seek(0)
    # Its length does not depend on the count: numpy pads the header so that it may grow.
    _write_header(file, dtype, digest.tokens)
    file.flush()
    return Written(tokens=digest.tokens, complete=complete, digests=digest.finish())


class ChunkDigest:
    """Digests of the chunks of a stream that arrives in parts of any length."""

    def __init__(self) -> None:
        self.tokens = 0
        self._done: list[str] = []
        self._open = hashlib.sha256()

    def update(self, tokens: np.ndarray) -> None:
        start = 0
        while start < len(tokens):
            part = tokens[start : start + CHUNK - self.tokens % CHUNK]
            self._open.update(part.astype("<i4").tobytes())
            self.tokens += len(part)
            start += len(part)
            if self.tokens % CHUNK == 0:
                self._done.append(self._open.hexdigest())
                self._open = hashlib.sha256()

    def finish(self) -> tuple[str, ...]:
        """Of all chunks so far, the last one maybe short."""
        last = [self._open.hexdigest()] if self.tokens % CHUNK else []
        return (*self._done, *last)


def prefix_digest(tokens: np.ndarray, digests: Sequence[str]) -> str:
    """Identity of `tokens`, the first of a stream whose chunks have `digests`."""
    whole, rest = divmod(len(tokens), CHUNK)
    tail = ChunkDigest()
    tail.update(tokens[len(tokens) - rest :])
    return hashlib.sha256("".join((*digests[:whole], *tail.finish())).encode()).hexdigest()


class TokenRun:
    """Several token arrays read as one, end to end, without a copy of them."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = parts
        self._ends = np.fromiter(accumulate(len(part) for part in parts), dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, stop: int) -> torch.Tensor:
        """int64 [stop - start] tokens."""
        pieces = []
        place = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            part, end = self._parts[place], int(self._ends[place])
            first = start - (end - len(part))
            pieces.append(part[first : first + stop - start].astype(np.int64))
            start += len(pieces[-1])
            place += 1
        return torch.from_numpy(pieces[0] if len(pieces) == 1 else np.concatenate(pieces))


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Lists of at most _BATCH pieces and about _BATCH_CHARACTERS."""
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if len(batch) == _BATCH or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(batch: list[Piece], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """int32 tokens of all pieces, EOS after those that end a document."""
    eos = end_of_document(tokenizer)
    # split_special_tokens: a text that spells "<eos>" out, as a book on tokenizers may, is text.
    # verbose=False: documents longer than the model's context are cut into blocks later.
    encoded = tokenizer(
        [piece.text for piece in batch],
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    parts = [
        np.array([*ids, eos] if piece.ends else ids, dtype=np.int32)
        for piece, ids in zip(batch, encoded, strict=True)
    ]
    return np.concatenate(parts)


def _write_header(file: IO[bytes], dtype: np.dtype, tokens: int) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(file, header)
