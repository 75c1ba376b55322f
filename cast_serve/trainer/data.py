"""Text files to fixed blocks of tokens, and the order in which a run reads them.

    .txt .text .md   documents separated by three newlines (two blank lines)
    .jsonl           one object a line with the key "text"
    + .xz            either, compressed

Documents are tokenised with the model's own tokenizer, each followed by EOS, joined, and cut into
blocks of `context` tokens; the rest shorter than a block is dropped.
"""

import hashlib
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from cast_serve.trainer.errors import RunError

_TEXT = (".txt", ".text", ".md")
_DOCUMENT_END = "\n\n\n"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Blocks int32 [blocks, context] for training and evaluation, and what identifies them."""

    train: torch.Tensor
    evaluation: torch.Tensor
    # What `evaluation` is: "held-out", "eval_data" or "training sample".
    evaluated_on: str
    sha256: str


class BlockStream(Dataset[dict[str, torch.Tensor]]):
    """The sequences of a whole run in order: epoch after epoch, each in its own permutation.

    Item i depends on the seed and i alone, so a resumed run reads on exactly where it stopped.
    """

    def __init__(self, blocks: torch.Tensor, *, length: int, seed: int) -> None:
        self._blocks = blocks
        self._length = length
        self._seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        epoch, place = divmod(index, len(self._blocks))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = torch.randperm(len(self._blocks), generator=generator)
            self._epoch = epoch
        return {"input_ids": self._blocks[self._order[place]].long()}


def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack items: input_ids int64 [batch, context], and what else they have."""
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def load_corpus(
    files: tuple[Path, ...],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    held_out: float,
    eval_files: tuple[Path, ...] = (),
) -> Corpus:
    """Read, tokenise and cut.

    Without `eval_files` every (1/held_out)-th block is kept for evaluation, so that each part of
    the text has a share in it.

    Raises:
        RunError: a file is missing, unreadable, of no known kind or empty; too few tokens.
    """
    blocks = to_blocks(tokenize(files, tokenizer), context=context, key="data")
    if eval_files:
        evaluation = to_blocks(tokenize(eval_files, tokenizer), context=context, key="eval_data")
        train, evaluated_on = blocks, "eval_data"
    elif held_out > 0:
        index = torch.arange(len(blocks) + 1, dtype=torch.float64).mul(held_out).floor()
        chosen = index.diff() > 0
        if not chosen.any():
            chosen[-1] = True
        train, evaluation, evaluated_on = blocks[~chosen], blocks[chosen], "held-out"
        if not len(train):
            raise RunError(
                f"data: {len(blocks)} block of {context} tokens leaves none to train on next to "
                f"held_out={held_out:g}; add text, lower context or set held_out to 0"
            )
    else:
        # The loss before and after the final prune must still be seen.
        train, evaluation, evaluated_on = blocks, blocks[:16], "training sample"
    digest = hashlib.sha256(train.numpy().tobytes())
    return Corpus(
        train=train, evaluation=evaluation, evaluated_on=evaluated_on, sha256=digest.hexdigest()
    )


def tokenize(files: tuple[Path, ...], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """int32 [tokens] of all documents of all files in order, EOS after each."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise RunError("model: its tokenizer has no EOS token to separate documents; set eos_token")
    parts = []
    for path in files:
        documents = list(_documents(path))
        if not documents:
            raise RunError(f"{path}: holds no text")
        # verbose=False: documents longer than the model's context are cut into blocks later.
        encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
        parts += [torch.tensor([*ids, eos], dtype=torch.int32) for ids in encoded]
    return torch.cat(parts)


def to_blocks(tokens: torch.Tensor, *, context: int, key: str) -> torch.Tensor:
    """[blocks, context] view of `tokens`, without the rest; RunError if there is not one block."""
    count = len(tokens) // context
    if not count:
        raise RunError(
            f"{key}: {len(tokens)} tokens are less than one block of context={context}; "
            "add text or lower context"
        )
    return tokens[: count * context].view(count, context)


def _documents(path: Path) -> Iterator[str]:
    kind = Path(path.stem).suffix if path.suffix == ".xz" else path.suffix
    if kind not in (*_TEXT, ".jsonl"):
        known = ", ".join((*_TEXT, ".jsonl"))
        raise RunError(f"{path}: unknown kind of file; use {known}, each also with .xz")
    text = _read(path)
    if kind == ".jsonl":
        yield from _json_documents(path, text)
    else:
        yield from (part for part in map(str.strip, text.split(_DOCUMENT_END)) if part)


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from error
    except lzma.LZMAError as error:
        raise RunError(f"{path}: is not a whole xz file: {error}") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: is not UTF-8 at byte {error.start}; convert it") from error


def _json_documents(path: Path, text: str) -> Iterator[str]:
    # Not splitlines(): U+2028 and its like are legal inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RunError(f"{path}: line {number} is not JSON: {error.msg}") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise RunError(f'{path}: line {number} is no object with a string under "text"')
        if row["text"].strip():
            yield row["text"]
