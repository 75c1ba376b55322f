"""Zero-shot multiple choice from local files: which choice the model finds most likely.

    jsonl    one object a line: "query", "choices" (two or more), "gold", the right one from 0
    prompt   query, its last line breaks dropped, then `between`, a space and the choice. With
             "\\nAnswer:" between, these are the prompts of lm-eval's piqa and arc_easy.

A choice's score is the sum of the log-probabilities of its tokens. acc takes the highest score,
acc_norm the highest per character of the choice. Both, the split into tokens and the standard
error are lm-eval's, so that the same items give the same numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cast_serve.trainer.data.files import json_rows, require_unicode
from cast_serve.trainer.errors import RunError


@dataclass(frozen=True, kw_only=True)
class Item:
    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Tokens of a prompt and of one choice after it; the prompt's start may be cut off."""

    prompt: list[int]
    choice: list[int]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Shares of right items with their standard errors (nan of one item).

    Attributes:
        cut: choices whose prompt was longer than the model's positions and lost its start.
    """

    items: int
    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float
    cut: int


def read_items(path: Path) -> list[Item]:
    """The items of a jsonl file.

    Raises:
        RunError: unreadable, empty, or a line is no item; names file and line.
    """
    items = [_item(where, row) for where, row in json_rows(path)]
    if not items:
        raise RunError(f"zero-shot: {path}: holds no items")
    return items


def score_items(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    between: str,
    batch_size: int,
) -> Accuracy:
    """Answer every item.

    Raises:
        RunError: a choice alone is longer than the model has positions for.
    """
    pairs = [
        encode_pair(tokenizer, item.query.rstrip("\n") + between, f" {choice}")
        for item in items
        for choice in item.choices
    ]
    # OPT and others without a limit in their config take any length.
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    # The last token of a choice is only predicted, so it needs no position.
    cut = sum(len(pair.prompt) + len(pair.choice) - 1 > limit for pair in pairs)
    pairs = [_cut(pair, limit) for pair in pairs]
    scores = iter(log_likelihoods(model, pairs, batch_size=batch_size))
    right, right_norm = [], []
    for item in items:
        mine = [next(scores) for _ in item.choices]
        per_character = [score / len(c) for score, c in zip(mine, item.choices, strict=True)]
        right.append(mine.index(max(mine)) == item.gold)
        right_norm.append(per_character.index(max(per_character)) == item.gold)
    return Accuracy(
        items=len(items),
        acc=sum(right) / len(items),
        acc_stderr=_standard_error(right),
        acc_norm=sum(right_norm) / len(items),
        acc_norm_stderr=_standard_error(right_norm),
        cut=cut,
    )


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, choice: str) -> Pair:
    """Split the tokens of prompt + choice after as many as the prompt has alone.

    Spaces at the prompt's end go to the choice, where tokenizers have them. An empty prompt is
    the tokenizer's BOS, else its EOS.
    """
    bare = prompt.rstrip()
    choice = prompt[len(bare) :] + choice
    whole: list[int] = tokenizer.encode(bare + choice)
    if bare:
        length = len(tokenizer.encode(bare))
        return Pair(prompt=whole[:length], choice=whole[length:])
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise RunError("model: its tokenizer has neither BOS nor EOS to score an empty query after")
    return Pair(prompt=[first], choice=whole[1:] if whole[0] == first else whole)


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel, pairs: Sequence[Pair], *, batch_size: int
) -> list[float]:
    """log P(choice | prompt) of every pair, in nats, summed over its tokens.

    Batches are padded on the right, where causal attention does not look.
    """
    # By length, so that little is padding; the longest first, so that too large a batch fails now.
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i].prompt) - len(pairs[i].choice))
    found = [0.0] * len(pairs)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows = [torch.tensor((pairs[i].prompt + pairs[i].choice)[:-1]) for i in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        ends = torch.tensor([len(row) for row in rows], device=model.device)
        mask = (torch.arange(ids.shape[1], device=model.device) < ends.unsqueeze(1)).long()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        choices = [torch.tensor(pairs[i].choice, dtype=torch.long) for i in batch]
        # All choices in one go: waiting for the GPU after each takes longer than the model.
        row, position = _places_before(choices, rows)
        log_probs = logits[row.to(model.device), position.to(model.device)].float().log_softmax(-1)
        tokens = torch.cat(choices).to(model.device)
        picked = log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1).cpu()
        parts = picked.split([len(choice) for choice in choices])
        for i, part in zip(batch, parts, strict=True):
            found[i] = part.sum(dtype=torch.float64).item()
    return found


def _places_before(
    choices: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and position at which each token of `choices`, which end `rows`, is predicted."""
    row = [torch.full_like(choice, index) for index, choice in enumerate(choices)]
    position = [
        torch.arange(len(ids) - len(choice), len(ids))
        for ids, choice in zip(rows, choices, strict=True)
    ]
    return torch.cat(row), torch.cat(position)


def _item(where: str, row: Any) -> Item:
    row = row if isinstance(row, dict) else {}
    query, choices, gold = (row.get(key) for key in ("query", "choices", "gold"))
    if not isinstance(query, str):
        raise RunError(f'{where} has no string under "query"')
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise RunError(f'{where} has no list of non-empty strings under "choices"')
    if len(choices) < 2:
        raise RunError(f"{where} has {len(choices)} choices; an item needs two or more")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise RunError(f'{where}: "gold" is {gold!r}; it must be from 0 to {len(choices) - 1}')
    require_unicode("".join((query, *choices)), where)
    return Item(query=query, choices=tuple(choices), gold=gold)


def _cut(pair: Pair, limit: float) -> Pair:
    over = len(pair.prompt) + len(pair.choice) - 1 - limit
    if over <= 0:
        return pair
    if over >= len(pair.prompt):
        raise RunError(
            f"zero-shot: a choice of {len(pair.choice)} tokens is longer than the model's "
            f"{limit} positions"
        )
    return Pair(prompt=pair.prompt[int(over) :], choice=pair.choice)


def _standard_error(right: Sequence[bool]) -> float:
    """Of the mean, from the sample's standard deviation (n - 1)."""
    count, mean = len(right), sum(right) / len(right)
    return math.sqrt(mean * (1 - mean) / (count - 1)) if count > 1 else math.nan
