"""A text file to the one stream of tokens that perplexity is taken over.

raw         the whole file is one text, line breaks and all, with the special tokens that the
            tokenizer puts around a text (a BOS, or none): published WikiText-2 numbers
documents   as cast-train reads its own data: documents one after another, EOS after each
"""

from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from cast_serve.trainer.data import read_tokens
from cast_serve.trainer.data_source import DataSource
from cast_serve.trainer.errors import RunError

Join = Literal["raw", "documents"]

# Kinds of files that hold documents and not one text.
_CONTAINERS = (".jsonl", ".parquet", ".xz", ".zst", ".gz")


def token_stream(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, join: Join, text_key: str | None = None
) -> torch.Tensor:
    """int32 [tokens] of the file `path`.

    Args:
        text_key: key or column of the text of documents; None is "text".

    Raises:
        RunError: missing, unreadable, not UTF-8, no text, or no plain text where join is raw.
    """
    if join == "documents":
        tokens = read_tokens((DataSource(place=str(path)),), tokenizer, text_key=text_key)
        return tokens.read(0, len(tokens)).int()
    if path.suffix in _CONTAINERS:
        raise RunError(f"text: {path} is no plain text file; use --join documents")
    try:
        raw = path.read_bytes()
        # Not as text: a carriage return is part of it. A byte order mark is not.
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise RunError(f"text: {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        # error.object is the text without a BOM.
        place = len(raw) - len(error.object) + error.start
        raise RunError(f"text: {path}: is not UTF-8 at byte {place}; convert it") from error
    # verbose=False: that a text is longer than the model's context is no mistake here.
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int32)
