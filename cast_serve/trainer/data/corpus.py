"""What a run trains and evaluates on: its sources tokenised, cut in blocks, and split.

Without weights all sources are one stream, read in full once an epoch. With weights each is a part
of its own, drawn by its share and read again from its start when it is used up.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from math import ceil
from pathlib import Path
from typing import IO

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from cast_serve.trainer.data.blocks import Blocks, held_out_rows, to_blocks
from cast_serve.trainer.data.cache import cached, file_digest, key_of_source, uncached
from cast_serve.trainer.data.files import WITH_KEYS, Piece, documents, expand, kind_of, suffix
from cast_serve.trainer.data.hub import hub_commits, rows
from cast_serve.trainer.data.tokens import (
    TokenRun,
    Written,
    end_of_document,
    prefix_digest,
    write_tokens,
)
from cast_serve.trainer.data_source import DataSource, shares
from cast_serve.trainer.errors import RunError

# Goes up when the same text would give other tokens.
_READING = "3"
_SAMPLE = 16
_TEXT_KEY = "text"
# Of the text, to evaluate on; and how many tokens say enough: perplexity to a part in a thousand.
_HELD_OUT = 0.01
_ENOUGH = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Blocks for training and evaluation, and what identifies them.

    Attributes:
        parts: training blocks: one part, or one of each source that is drawn by weight.
        shares: of the training tokens, a part each, summing to 1; None without weights.
        names: of the parts.
        evaluation: int32 [blocks, context].
        evaluated_on: what `evaluation` is: "held-out", "eval_data" or "training sample".
        sha256: identity of the tokens of all sources, in order. It is made of digests that are kept
            beside the cached tokens, so a known text is not read for it again.
        eos: the token that ends a document.
    """

    parts: tuple[Blocks, ...]
    shares: tuple[float, ...] | None
    names: tuple[str, ...]
    evaluation: torch.Tensor
    evaluated_on: str
    sha256: str
    eos: int

    @property
    def train_blocks(self) -> int:
        """Training blocks of all parts together: an epoch."""
        return sum(len(part) for part in self.parts)

    @cached_property
    def evaluation_sha256(self) -> str:
        """Identity of the tokens of `evaluation`."""
        return hashlib.sha256(self.evaluation.numpy().tobytes()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How sources become tokens.

    Attributes:
        text_key: key or column of the text in .jsonl, .parquet and data sets.
        cache: keep tokens for the next run.
        commits: at which data sets of the hub are read, by name; the newest of others.
    """

    tokenizer: PreTrainedTokenizerBase
    text_key: str
    cache: bool
    commits: Mapping[str, str] = field(default_factory=dict)


def load_corpus(
    sources: tuple[DataSource, ...],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    held_out: float | None,
    eval_sources: tuple[DataSource, ...] = (),
    budget: int | None = None,
    text_key: str | None = None,
    cache: bool = True,
    commits: Mapping[str, str] | None = None,
) -> Corpus:
    """Read, tokenise, cut and split.

    Without `eval_sources` every (1/held_out)-th block is kept for evaluation, so that each part of
    the text has a share in it; None is _HELD_OUT, or what gives _ENOUGH tokens if that is less.
    With a `budget` of training tokens, data sets of the hub are read no further than it can need;
    files are read in full, because blocks are drawn from all of a source.

    Args:
        commits: at which data sets of the hub are read, by name; the newest of others.

    Raises:
        RunError: a source is missing, unreadable, of no known kind or empty; too few tokens.
    """
    reading = Reading(
        tokenizer=tokenizer, text_key=text_key or _TEXT_KEY, cache=cache, commits=commits or {}
    )
    eos = end_of_document(tokenizer)
    weights = shares(sources)
    streams, digests = [], []
    for place, source in enumerate(sources):
        share = 1.0 if weights is None else weights[place]
        most = _HELD_OUT if held_out is None else held_out
        limit = None if budget is None else _needed(budget * share, most, context)
        tokens, written = _tokens(source, reading, limit if source.hub else None)
        streams.append(tokens)
        digests.append(prefix_digest(tokens, written.digests))
    if weights is None:
        names: tuple[str, ...] = ("data",)
        blocks = [to_blocks(TokenRun(streams), context=context, key="data")]
    else:
        names = tuple(source.name for source in sources)
        blocks = [
            to_blocks(TokenRun([stream]), context=context, key=f"data: {source.place}")
            for source, stream in zip(sources, streams, strict=True)
        ]
    if eval_sources:
        run = TokenRun([_tokens(source, reading, None)[0] for source in eval_sources])
        evaluation = to_blocks(run, context=context, key="eval_data").stacked()
        evaluated_on = "eval_data"
    elif held_out != 0:
        if held_out is None:
            held_out = min(_HELD_OUT, _ENOUGH / sum(map(len, streams)))
        blocks, evaluation = _hold_out(blocks, held_out, context)
        evaluated_on = "held-out"
    else:
        # The loss before and after the final prune must still be seen.
        evaluation = blocks[0].part(torch.arange(min(_SAMPLE, len(blocks[0])))).stacked()
        evaluated_on = "training sample"
    return Corpus(
        parts=tuple(blocks),
        shares=weights,
        names=names,
        evaluation=evaluation,
        evaluated_on=evaluated_on,
        sha256=hashlib.sha256("".join(digests).encode()).hexdigest(),
        eos=eos,
    )


def read_tokens(
    sources: tuple[DataSource, ...],
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_key: str | None = None,
    cache: bool = True,
) -> TokenRun:
    """All tokens of `sources`, end to end, EOS after each document; their weights do not matter.

    Args:
        text_key: key or column of the text; None is "text".

    Raises:
        RunError: as load_corpus.
    """
    reading = Reading(tokenizer=tokenizer, text_key=text_key or _TEXT_KEY, cache=cache)
    return TokenRun([_tokens(source, reading, None)[0] for source in sources])


def require_keys(sources: Sequence[DataSource], text_key: str | None) -> None:
    """Refuse a key that no source has a use for.

    Raises:
        RunError: none is of the hub or a file with keys; or one is missing or of no known kind.
    """
    if text_key in (None, _TEXT_KEY):
        return
    for source in sources:
        if source.hub or any(kind_of(file) in WITH_KEYS for file in expand(source.path)):
            return
    raise RunError(
        f"text_key: {sources[0].place} has no keys, and no other file given has; leave it out"
    )


def _needed(budget: float, held_out: float, context: int) -> int:
    """Tokens of a source that give `budget` for training, the held-out share set aside."""
    # Two blocks: one may be cut off at the end, one is held out in any case.
    return ceil(budget / (1 - held_out)) + 2 * context


def _hold_out(
    blocks: list[Blocks], share: float, context: int
) -> tuple[list[Blocks], torch.Tensor]:
    chosen = [held_out_rows(len(part), share) for part in blocks]
    if not any(rows.any() for rows in chosen):
        largest = max(range(len(blocks)), key=lambda place: len(blocks[place]))
        chosen[largest][-1] = True
    train = [part.part(~rows) for part, rows in zip(blocks, chosen, strict=True)]
    if not all(len(part) for part in train):
        raise RunError(
            f"data: 1 block of {context} tokens leaves none to train on next to "
            f"held_out={share:g}; add text, lower context or set held_out to 0"
        )
    kept = [part.part(rows).stacked() for part, rows in zip(blocks, chosen, strict=True)]
    return train, torch.cat(kept)


def _tokens(source: DataSource, reading: Reading, limit: int | None) -> tuple[np.ndarray, Written]:
    """At most `limit` tokens of a source, and what is known of the file that holds them."""
    parts = [f"reading {_READING}", f"text_key {reading.text_key}"]
    hub = source.hub
    pieces: Iterator[Piece]
    if hub is None:
        files = expand(source.path)
        pieces = chain.from_iterable(documents(f, text_key=reading.text_key) for f in files)
        if reading.cache:
            parts += [f"{suffix(file)} {file_digest(file)}" for file in files]
    else:
        commit = hub_commits([source], known=reading.commits, cache=reading.cache).get(hub.name)
        pieces = rows(hub, commit, text_key=reading.text_key)
        parts += [f"hub {hub.config} {hub.split}"]
        if hub.folder is None:
            parts += [f"{hub.name} {commit}"]
        elif reading.cache:
            parts += _folder_parts(hub.folder)

    def write(file: IO[bytes]) -> Written:
        return write_tokens(file, pieces, reading.tokenizer, limit=limit, name=source.name)

    if reading.cache:
        key = key_of_source(parts, reading.tokenizer)
        tokens, written = cached(key, write, limit=limit)
    else:
        tokens, written = uncached(write)
    return tokens[:limit], written


def _folder_parts(folder: Path) -> list[str]:
    """What the data set in a folder depends on: the names and the content of its files."""
    if not folder.is_dir():
        raise RunError(f"data: hub:{folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [f"{path.relative_to(folder)} {file_digest(path)}" for path in files]
