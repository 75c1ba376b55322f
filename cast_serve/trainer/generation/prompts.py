"""Beginnings for a model to continue: pieces of texts of the kind it should write.

Without a corpus, or for a share of the texts, it begins from nothing: its BOS (or EOS) token alone.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from cast_serve.trainer.data.blocks import Blocks
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.generation.characters import Decode, first_start, whole_end


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompt number i, for any i: it depends on `seed` and i alone.

    Attributes:
        corpus: blocks of tokens; a prompt is 1 to all of one, from its first character that is not
            cut, to the end of one; None for none.
        unprompted: share of prompts that are `begin` alone.
        begin: the token every text starts with.
        end: the token that ends a document.
        decode: the text of tokens.
    """

    corpus: Sequence[torch.Tensor] | Blocks | None
    unprompted: float
    begin: int
    end: int
    decode: Decode
    seed: int

    def __getitem__(self, index: int) -> list[int]:
        draw = random.Random(self.seed * 1_000_003 + index)
        if self.corpus is None or draw.random() < self.unprompted:
            return [self.begin]
        block = self.corpus[draw.randrange(len(self.corpus))].tolist()
        length = draw.randint(1, len(block))
        tokens = block[first_start(block, self.decode) :]
        # Not the end of one document and the beginning of the next as one text.
        document = tokens[: tokens.index(self.end) if self.end in tokens else None]
        return [self.begin, *whole_end(document, length, self.decode)]


def begin_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that the model expects before a text: BOS, or else EOS.

    Raises:
        RunError: the tokenizer has neither.
    """
    candidates: Sequence[int | None] = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    for token in candidates:
        if token is not None:
            return token
    raise RunError("model: its tokenizer has neither a BOS nor an EOS token to begin a text with")
