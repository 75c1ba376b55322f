"""Perplexity of a token stream by the two conventions in use. Losses are fp32 log-softmax.

    windows   non-overlapping windows of `context` tokens, each seen alone, the rest dropped: the
              convention of the SparseGPT, Wanda and CAST tables. A window scores all but its
              first token.
    strided   Hugging Face's sliding window: windows of `context` start every `stride` tokens and
              score what no window before has, so every token but the stream's first is scored
              once, with at least context - stride tokens before it from the second window on.

With stride = context windows do not overlap and a window's first token has nothing to be predicted
from: then strided is `windows` and, as a shorter window, the rest.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from cast_serve.trainer.distillation.loss import IGNORED
from cast_serve.trainer.evaluation.mean_loss import mean_loss, to_perplexity
from cast_serve.trainer.head import loss_head
from cast_serve.trainer.objective import Objective, next_tokens


@dataclass(frozen=True, kw_only=True)
class Score:
    """`nats`, the negative log-likelihood, summed over the `tokens` that were predicted."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return to_perplexity(self.loss)


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens start..end of the stream, of which scored..end are predicted."""

    start: int
    end: int
    scored: int


def score_windows(
    model: PreTrainedModel, tokens: torch.Tensor, context: int, *, batch_size: int
) -> Score:
    """Non-overlapping windows over `tokens` int [tokens], at least one of `context`."""
    count = len(tokens) // context
    windows = tokens[: count * context].view(count, context)
    scored = count * (context - 1)
    return Score(nats=mean_loss(model, windows, batch_size=batch_size) * scored, tokens=scored)


@torch.inference_mode()
def score_strided(
    model: PreTrainedModel, tokens: torch.Tensor, context: int, *, stride: int, batch_size: int
) -> Score:
    """Sliding windows over `tokens` int [tokens], 1 <= stride <= context."""
    objective, head = Objective(eta=0.0), loss_head(model)
    nats, scored = 0.0, 0
    *full, last = strided_windows(len(tokens), context=context, stride=stride)
    batches = [full[i : i + batch_size] for i in range(0, len(full), batch_size)]
    # The last is shorter than the others, unless it ends at the stream's end by chance.
    for batch in [*batches, [last]]:
        ids = torch.stack([tokens[w.start : w.end] for w in batch]).long().to(model.device)
        told = ids.clone()
        for row, window in zip(told, batch, strict=True):
            row[: window.scored - window.start] = IGNORED
        labels = next_tokens(told)
        count = int((labels != IGNORED).sum())
        nats += objective(model, head, ids, None, labels=labels).ce.item() * count
        scored += count
    return Score(nats=nats, tokens=scored)


def strided_windows(count: int, *, context: int, stride: int) -> Iterator[Window]:
    """The windows over a stream of `count` tokens; the last ends with it."""
    scored = 0
    for start in range(0, count, stride):
        end = min(start + context, count)
        yield Window(start=start, end=end, scored=scored)
        if end == count:
            return
        scored = end
