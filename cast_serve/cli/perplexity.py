"""The perplexity of a 2:4 checkpoint of any form that is read, under plain transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.trainer.data import read_tokens, require_keys, to_blocks
from cast_serve.trainer.data_source import DataSource
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.evaluation.mean_loss import mean_loss, to_perplexity
from cast_serve.trainer.source import context_length
from cast_serve.trainer.sparse_source import load_sparse


def measure_on(
    text: tuple[Path, ...], context: int | None, *, text_key: str | None = None
) -> Callable[[Path], dict[str, Any]]:
    """What measures a checkpoint folder: perplexity, tokens, context and the names of the files.

    Args:
        text: files as cast-train reads them.
        context: tokens per window; None: 1024 or the model's limit.
        text_key: key or column of the text in .jsonl and .parquet; None is "text".

    Raises:
        CheckpointError: one of them names no text; `measure` too, where it cannot be read.
    """
    sources = tuple(_source(path) for path in text)
    # Its bars of loading would break up the one of the conversion.
    disable_progress_bar()

    def measure(folder: Path) -> dict[str, Any]:
        try:
            source = load_sparse(folder)
            length = context_length(source.model, context)
        except RunError as error:
            raise CheckpointError(folder, str(error)) from error
        try:
            require_keys(sources, text_key)
            tokens = read_tokens(sources, source.tokenizer, text_key=text_key)
            windows = to_blocks(tokens, context=length, key="text").stacked()
        except RunError as error:
            # Which file it is of the error says itself.
            place, _, reason = str(error).partition(": ")
            raise CheckpointError(Path(place), reason) from error
        return {
            "perplexity": to_perplexity(mean_loss(source.model, windows)),
            "tokens": windows.numel(),
            "context": length,
            "text": [path.name for path in text],
        }

    return measure


def _source(path: Path) -> DataSource:
    try:
        return DataSource(place=str(path))
    except RunError as error:
        raise CheckpointError(path, str(error)) from error
