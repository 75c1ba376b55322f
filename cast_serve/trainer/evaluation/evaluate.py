"""One evaluation: a checkpoint, and everything that was asked of it."""

import errno
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from cast_serve.trainer.data import require_keys
from cast_serve.trainer.data_source import DataSource
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.evaluation.checkpoint import Loaded, load_checkpoint
from cast_serve.trainer.evaluation.choices import Item, read_items, score_items
from cast_serve.trainer.evaluation.harness import find_tasks, run_tasks
from cast_serve.trainer.evaluation.perplexity import Score, score_strided, score_windows
from cast_serve.trainer.evaluation.text import Join, token_stream
from cast_serve.trainer.processes import takes_gpu
from cast_serve.trainer.provenance import versions
from cast_serve.trainer.source import context_length

# Keys that are looked at for some questions alone, and for which.
_READ_FOR = {
    "join": ("text",),
    "context": ("text",),
    "stride": ("text",),
    "between": ("zero_shot",),
    "include_path": ("tasks",),
    "limit": ("zero_shot", "tasks"),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to evaluate, and on what. Construction validates: RunError names the flag.

    Attributes:
        text_key: key or column of the text of documents; None is "text".
        context: tokens per window; None is 1024, or the model's limit if that is less.
        stride: tokens between sliding windows; None is half the context.
        between: text between query and choice.
        limit: first items of each zero-shot file and each task.
    """

    model: Path
    text: tuple[Path, ...] = ()
    join: Join = "raw"
    text_key: str | None = None
    context: int | None = None
    stride: int | None = None
    zero_shot: tuple[Path, ...] = ()
    between: str = "\nAnswer:"
    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    limit: int | None = None
    device: Literal["auto", "cpu"] = "auto"
    compute: Literal["fp32", "bf16"] = "fp32"
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not (self.text or self.zero_shot or self.tasks):
            raise RunError("nothing to evaluate on; give --text, --zero-shot or --tasks")
        if self.text_key is not None and not (self.text and self.join == "documents"):
            raise RunError(
                "text_key: a file that is read as one text has no keys; give --join documents"
            )
        for key, least in (("context", 2), ("stride", 1), ("limit", 1), ("batch_size", 1)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise RunError(f"{key}: {value} is out of range; it must be at least {least}")
        if self.include_path is not None and not self.include_path.is_dir():
            raise RunError(f"include_path: {self.include_path} is no folder")
        for key, questions in _READ_FOR.items():
            given = getattr(self, key) != getattr(type(self), key)
            if given and not any(getattr(self, question) for question in questions):
                flags = " or ".join("--" + question.replace("_", "-") for question in questions)
                raise RunError(f"{key}: is of {flags}; give that too, or leave it out")


def evaluate(request: Request) -> dict[str, Any]:
    """Results ready for JSON, in which a number that is not finite is None.

    Raises:
        RunError: something a user can put right.
        CheckpointError: damaged weights, or a format that is not read.
    """
    # What fails fast goes before the model is loaded.
    tasks = None
    if request.tasks:
        tasks = find_tasks(request.tasks, include_path=request.include_path)
    for path in request.text:
        if not path.exists():
            raise RunError(f"text: {path}: cannot be read: {os.strerror(errno.ENOENT)}")
    if request.join == "documents":
        require_keys([DataSource(place=str(path)) for path in request.text], request.text_key)
    items = {path: read_items(path)[: request.limit] for path in request.zero_shot}
    loaded = load_checkpoint(request.model, dtype=_dtype(request))
    device = "cuda" if takes_gpu(request.device) else "cpu"
    loaded.model.to(device)  # type: ignore[arg-type]  # hidden by a decorator of transformers
    text = [_perplexities(loaded, path, request) for path in request.text]
    zero_shot = [_zero_shot(loaded, path, found, request) for path, found in items.items()]
    result: dict[str, Any] = {
        "model": request.model.resolve().name,
        "form": str(loaded.form),
        "compute": request.compute,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "text": text,
        "zero_shot": zero_shot,
        "tasks": run_tasks(
            loaded.model,
            loaded.tokenizer,
            tasks,
            batch_size=request.batch_size,
            limit=request.limit,
        )
        if tasks
        else {},
        "versions": versions(),
    }
    return finite(result)


def finite(value: Any) -> Any:
    """`value` with None for the infinities and NaNs that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _dtype(request: Request) -> torch.dtype:
    return torch.bfloat16 if request.compute == "bf16" else torch.float32


def _perplexities(loaded: Loaded, path: Path, request: Request) -> dict[str, Any]:
    context = context_length(loaded.model, request.context)
    stride = request.stride or max(1, context // 2)
    if stride > context:
        raise RunError(
            f"stride: {stride} would leave out tokens between windows of {context}; "
            "give at most the context"
        )
    tokens = token_stream(path, loaded.tokenizer, join=request.join, text_key=request.text_key)
    if len(tokens) < context:
        raise RunError(
            f"text: {path} has {len(tokens)} tokens, less than one window of {context}; "
            "add text or lower --context"
        )
    batch = request.batch_size
    windows = score_windows(loaded.model, tokens, context, batch_size=batch)
    strided = score_strided(loaded.model, tokens, context, stride=stride, batch_size=batch)
    return {
        "file": path.name,
        "join": request.join,
        "tokens": len(tokens),
        "context": context,
        "windows": _score(windows),
        "strided": {"stride": stride} | _score(strided),
    }


def _score(score: Score) -> dict[str, float]:
    return {
        "perplexity": score.perplexity,
        "loss": score.loss,
        "nats": score.nats,
        "scored_tokens": score.tokens,
    }


def _zero_shot(loaded: Loaded, path: Path, items: list[Item], request: Request) -> dict[str, Any]:
    accuracy = score_items(
        loaded.model,
        loaded.tokenizer,
        items,
        between=request.between,
        batch_size=request.batch_size,
    )
    return {"file": path.name, "between": request.between} | asdict(accuracy)
