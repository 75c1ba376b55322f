"""Files to token sequences with labels: plain text, completions or conversations.

A .txt, and rows of a .jsonl or .parquet by the keys that they hold:

text                    as in training: blocks of `context`, loss on every token
prompt and completion   loss on the completion and the EOS after it
messages                the tokenizer's chat template; loss on what follows the generation prompt of
                        every assistant turn

Folders and compressed files are read as in training.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from cast_serve.trainer.data import BlockStream, load_corpus, require_keys
from cast_serve.trainer.data.blocks import held_out_rows
from cast_serve.trainer.data.files import (
    WITH_KEYS,
    expand,
    json_rows,
    kind_of,
    parquet_columns,
    parquet_rows,
    require_unicode,
)
from cast_serve.trainer.data_source import DataSource
from cast_serve.trainer.distillation.loss import IGNORED
from cast_serve.trainer.errors import RunError

# Pieces of one sequence in order; the loss is taken on those marked True.
Pieces = list[tuple[str, bool]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """input_ids and labels, int64 [tokens]; a label is its token or -100, and the first is -100."""

    input_ids: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What is trained and evaluated on.

    Attributes:
        kind: "text", "prompt" or "messages".
        cut: examples that lost their end because they are longer than the context.
        dropped: examples whose every label was cut off.
        evaluated_on: "held-out", "eval_data" or "training sample".
    """

    train: list[Example]
    evaluation: list[Example]
    kind: str
    cut: int
    dropped: int
    evaluated_on: str
    sha256: str


class ExampleStream(Dataset[Example]):
    """The examples of a whole run, each epoch in the permutation that BlockStream gives it."""

    def __init__(self, examples: list[Example], *, length: int, seed: int) -> None:
        self._examples = examples
        self._order = BlockStream(torch.arange(len(examples))[:, None], length=length, seed=seed)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Example:
        return self._examples[int(self._order[index]["input_ids"])]


def pad(examples: list[Example]) -> dict[str, torch.Tensor]:
    """input_ids and labels int64 [batch, longest], padded on the right.

    The padding needs no attention mask: nothing before it sees it, and nothing is asked of it.
    """
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence([e.input_ids for e in examples], True, 0),
        "labels": torch.nn.utils.rnn.pad_sequence([e.labels for e in examples], True, IGNORED),
    }


def load_examples(
    files: tuple[Path, ...],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    held_out: float,
    eval_files: tuple[Path, ...] = (),
    text_key: str | None = None,
) -> Examples:
    """Read and tokenise; without `eval_files` a share of `held_out` is held out, evenly spaced.

    Args:
        files: each of them may be a folder.
        text_key: key or column of text to train on, whatever else rows hold; None is "text", of
            rows that are neither prompts nor messages.

    Raises:
        RunError: a file or line is at fault, files are of several kinds or have no keys for
            `text_key`, no template for "messages", or nothing is left to train on.
    """
    paths = [path for file in files for path in expand(file)]
    eval_paths = [path for file in eval_files for path in expand(file)]
    require_keys((*_sources(files), *_sources(eval_files)), text_key)
    kind = _kind(paths[0], text_key)
    for path in (*paths, *eval_paths):
        if (other := _kind(path, text_key)) != kind:
            raise RunError(f"{path}: holds {other}, but {paths[0]} holds {kind}; give one kind")
    if kind == "text":
        corpus = load_corpus(
            _sources(files),
            tokenizer,
            context=context,
            held_out=held_out,
            eval_sources=_sources(eval_files),
            text_key=text_key,
        )
        (blocks,) = corpus.parts
        return Examples(
            train=[_whole(blocks[place]) for place in range(len(blocks))],
            evaluation=[_whole(block) for block in corpus.evaluation],
            kind="text",
            cut=0,
            dropped=0,
            evaluated_on=corpus.evaluated_on,
            sha256=corpus.sha256,
        )
    train, cut, dropped = _tokenise(paths, tokenizer, context)
    evaluated_on = "training sample"
    evaluation = train[:16]
    if eval_files:
        evaluation, *_ = _tokenise(eval_paths, tokenizer, context)
        evaluated_on = "eval_data"
    elif held_out > 0 and len(train) > 1:
        chosen = held_out_rows(len(train), held_out)
        # A share of less than one example is still one.
        chosen[-1] |= not chosen.any()
        evaluation = [each for each, held in zip(train, chosen, strict=True) if held]
        train = [each for each, held in zip(train, chosen, strict=True) if not held]
        evaluated_on = "held-out"
    digest = hashlib.sha256()
    for example in train:
        digest.update(torch.stack((example.input_ids, example.labels)).numpy().tobytes())
    return Examples(
        train=train,
        evaluation=evaluation,
        kind=kind,
        cut=cut,
        dropped=dropped,
        evaluated_on=evaluated_on,
        sha256=digest.hexdigest(),
    )


def _sources(files: tuple[Path, ...]) -> tuple[DataSource, ...]:
    return tuple(DataSource(place=str(path)) for path in files)


def _whole(block: torch.Tensor) -> Example:
    ids = block.long()
    labels = ids.clone()
    labels[0] = IGNORED
    return Example(input_ids=ids, labels=labels)


def _tokenise(
    paths: list[Path], tokenizer: PreTrainedTokenizerBase, context: int
) -> tuple[list[Example], int, int]:
    """Examples that keep a label, how many lost their end, and how many were dropped for it."""
    examples, cut, dropped = [], 0, 0
    for path in paths:
        for where, row in _rows(path):
            pieces, first_has_special_tokens = _pieces(where, row, tokenizer)
            ids: list[int] = []
            labels: list[int] = []
            before = ""
            for place, (text, learned) in enumerate(pieces):
                require_unicode(text, where)
                special = place == 0 and first_has_special_tokens
                part = (
                    tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
                    if special
                    else _continuation(before, text, tokenizer)
                )
                ids += part
                labels += part if learned else [IGNORED] * len(part)
                before += text
            if first_has_special_tokens:
                ids.append(tokenizer.eos_token_id)
                labels.append(tokenizer.eos_token_id)
            labels[0] = IGNORED
            cut += len(ids) > context
            example = Example(
                input_ids=torch.tensor(ids[:context]), labels=torch.tensor(labels[:context])
            )
            if (example.labels != IGNORED).any():
                examples.append(example)
            else:
                dropped += 1
    if not examples:
        raise RunError(
            f"data: no example keeps a token to learn within context={context}; raise context"
        )
    return examples, cut, dropped


def _continuation(before: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens by which `text` goes on after the tokens of `before`.

    Of the two together, because tokenizers of the SentencePiece kind begin every text with a space.
    Where the last token of `before` would grow into `text` a server has sent it already, so `text`
    then follows a line break, which no token grows beyond; if that is untrue, it stands alone.
    """

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    for context in (before, "\n"):
        head, whole = tokens(context), tokens(context + text)
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return tokens(text)


def _pieces(where: str, row: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[Pieces, bool]:
    """The pieces of a row, and whether the tokenizer adds its special tokens to the first.

    A prompt is tokenised as a server does it; a chat template writes special tokens itself.
    """
    if "messages" in row:
        return _turns(where, row["messages"], tokenizer), False
    if tokenizer.eos_token_id is None:
        raise RunError("model: its tokenizer has no EOS token to end completions; set eos_token")
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
        raise RunError(f'{where}: needs strings under "prompt" and "completion"')
    return [(prompt, False), (completion, True)], True


def _turns(where: str, messages: Any, tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """A conversation as the chat template writes it, cut where assistant turns begin and end."""
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise RunError(f'{where}: "messages" is no list of objects')
    if tokenizer.chat_template is None:
        raise RunError("model: its tokenizer has no chat template for messages; add one")
    learned = [place for place, each in enumerate(messages) if each.get("role") == "assistant"]
    if not learned:
        raise RunError(f"{where}: has no assistant turn to learn")

    def write(count: int, *, prompt: bool) -> str:
        try:
            text = tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=prompt
            )
        # jinja2 raises what templates ask it to, and what goes wrong in them.
        except Exception as error:
            raise RunError(f"{where}: the chat template refuses it: {error}") from error
        assert isinstance(text, str)
        return text

    whole = write(learned[-1] + 1, prompt=False)
    pieces: Pieces = []
    done = 0
    for place in learned:
        before, after = write(place, prompt=True), write(place + 1, prompt=False)
        if not (whole.startswith(before) and whole.startswith(after)) or len(before) < done:
            raise RunError(
                f"{where}: the chat template writes turn {place + 1} another way when others "
                "follow; give conversations that end with their one assistant turn"
            )
        pieces += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
        done = len(after)
    return [piece for piece in pieces if piece[0]]


def _kind(path: Path, text_key: str | None) -> str:
    """ "text", "prompt" or "messages", by the name of the file and the keys that its rows hold."""
    suffix = kind_of(path)
    if text_key is not None or suffix not in WITH_KEYS:
        return "text"
    if suffix == ".parquet":
        where, keys = str(path), parquet_columns(path)
    else:
        first = next(_rows(path), None)
        if first is None:
            raise RunError(f"{path}: holds no lines")
        where, keys = first[0], list(first[1])
    known = ("messages", "prompt", "text")
    found = next((key for key in known if key in keys), None)
    if found is None:
        raise RunError(f"{where}: has none of the keys {', '.join(known)}")
    return found


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and row for errors, values by key) of a .jsonl or .parquet."""
    if kind_of(path) == ".parquet":
        known = ("messages", "prompt", "completion")
        yield from parquet_rows(path, [name for name in parquet_columns(path) if name in known])
        return
    for where, row in json_rows(path):
        if not isinstance(row, dict):
            raise RunError(f"{where} is no JSON object")
        yield where, row
