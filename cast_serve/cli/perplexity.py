"""The perplexity of a 2:4 checkpoint of any form that is read, under plain transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.trainer.data import load_corpus
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.evaluate import mean_loss, to_perplexity
from cast_serve.trainer.source import context_length
from cast_serve.trainer.sparse_source import load_sparse


def measure_on(text: tuple[Path, ...], context: int | None) -> Callable[[Path], dict[str, Any]]:
    """What measures a checkpoint folder: perplexity, tokens, context and the names of the files.

    Args:
        text: files as cast-train reads them.
        context: tokens per window; None: 1024 or the model's limit.
    """

    # Its bars of loading would break up the one of the conversion.
    disable_progress_bar()

    def measure(folder: Path) -> dict[str, Any]:
        try:
            source = load_sparse(folder)
            length = context_length(source.model, context)
            corpus = load_corpus(text, source.tokenizer, context=length, held_out=0)
        except RunError as error:
            raise CheckpointError(folder, str(error)) from error
        return {
            "perplexity": to_perplexity(mean_loss(source.model, corpus.train)),
            "tokens": corpus.train.numel(),
            "context": length,
            "text": [path.name for path in text],
        }

    return measure
