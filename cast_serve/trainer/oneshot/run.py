"""From a dense checkpoint to a one-shot pruned one, in the forms that training exports."""

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cast_serve.model_loaders.convert import convert
from cast_serve.model_loaders.write import PROVENANCE, new_folder, write_json
from cast_serve.trainer.config import Pattern
from cast_serve.trainer.data import read_tokens, require_keys, to_blocks
from cast_serve.trainer.data_source import DataSource
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.export import write_dense, write_training_form
from cast_serve.trainer.oneshot.prune import METHODS, Method, prune_oneshot
from cast_serve.trainer.output import output_errors, require_free, require_writable
from cast_serve.trainer.processes import takes_gpu
from cast_serve.trainer.provenance import versions
from cast_serve.trainer.source import context_length, load_source

# Keys of the calibration text.
_OF_TEXT = ("data", "text_key", "samples", "context", "seed")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One pruning. Construction validates: RunError names the flag.

    Attributes:
        data: calibration text; magnitude takes none.
        text_key: key or column of the text in .jsonl, .parquet and data sets; None is "text".
        samples: calibration sequences, drawn by `seed` among all the text's.
        context: tokens per sequence; None is 1024, or the model's limit if that is less.
        export: "packed" becomes "dense" for patterns other than 2:4.
    """

    model: Path
    method: Method
    output: Path
    data: tuple[DataSource, ...] = ()
    text_key: str | None = None
    pattern: str = "2:4"
    samples: int = 128
    context: int | None = None
    seed: int = 0
    device: Literal["auto", "cpu"] = "auto"
    export: Literal["packed", "dense"] = "packed"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    def __post_init__(self) -> None:
        Pattern.parse(self.pattern)
        if self.method not in METHODS:
            raise RunError(f"method: {self.method!r} is not possible; use {', '.join(METHODS)}")
        for key in _OF_TEXT if self.method == "magnitude" else ():
            if getattr(self, key) != getattr(type(self), key):
                flag = "--" + key.replace("_", "-")
                raise RunError(f"{key}: magnitude looks at no text; leave {flag} out")
        if self.method != "magnitude" and not self.data:
            raise RunError(f"data: {self.method} needs calibration text; give --data FILE")
        weighted = [source.place for source in self.data if source.weight is not None]
        if weighted:
            raise RunError(f"data: {weighted[0]} has a weight; calibration reads all of it")
        for key, least in (("samples", 1), ("context", 2)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise RunError(f"{key}: {value} is out of range; it must be at least {least}")
        if not 0 <= self.seed < 2**32:
            raise RunError(f"seed: {self.seed} is out of range; it must be from 0 to below 2^32")
        require_free(self.output, source=self.model)

    @property
    def form(self) -> Literal["packed", "dense"]:
        """What is written: only 2:4 has a packed form."""
        return self.export if self.pattern == "2:4" else "dense"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """int32 [sequences, context], and what identifies the text they are from."""

    ids: torch.Tensor
    files: list[str]
    sha256: str


def run(request: Request, *, progress: Callable[[int, int], None] | None = None) -> str:
    """Prune and write request.output; returns what was done, in one line.

    Raises:
        RunError: something a user can put right.
    """
    require_writable(request.output)
    source = load_source(request.model)
    calibration = _calibration(request, source.model, source.tokenizer) if request.data else None
    source.model.to("cuda" if takes_gpu(request.device) else "cpu")  # type: ignore[arg-type]  # as in train.py
    choices = prune_oneshot(
        source.model,
        request.method,
        Pattern.parse(request.pattern),
        calibration.ids if calibration else None,
        progress=progress,
    )
    dtype = source.output_dtype(request.dtype)
    dense = [choice.name for choice in choices if choice.dense_because]
    with output_errors(request.output, trained=False):
        _write(request, source.model, dense, dtype, _provenance(request, calibration))
    seen = f", {len(calibration.ids)} x {calibration.ids.shape[1]} tokens" if calibration else ""
    return (
        f"pruned {len(choices) - len(dense)} layers to {request.pattern} "
        f"({request.method}{seen}); wrote {request.output} ({request.form})"
    )


def _calibration(
    request: Request, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Calibration:
    context = context_length(model, request.context)
    require_keys(request.data, request.text_key)
    tokens = read_tokens(request.data, tokenizer, text_key=request.text_key)
    blocks = to_blocks(tokens, context=context, key="data")
    generator = torch.Generator().manual_seed(request.seed)
    chosen = torch.randperm(len(blocks), generator=generator)[: request.samples]
    ids = blocks.part(chosen).stacked()
    return Calibration(
        ids=ids,
        files=[source.name for source in request.data],
        sha256=hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
    )


def _write(
    request: Request,
    model: PreTrainedModel,
    dense: list[str],
    dtype: torch.dtype,
    provenance: dict[str, Any],
) -> None:
    if request.pattern != "2:4":
        with new_folder(request.output, source=request.model) as folder:
            write_dense(model, model.state_dict(), request.model, folder, dtype)
            write_json(folder / PROVENANCE, provenance)
        return
    # A training form whose weights are pruned already and whose layers have no scales.
    with tempfile.TemporaryDirectory(dir=request.output.parent, prefix=".pruned-") as staging:
        form = Path(staging) / "training-form"
        write_training_form(
            model,
            model.state_dict(),
            request.model,
            form,
            pattern=request.pattern,
            ignore=dense,
        )
        convert(form, request.output, to=request.form, dtype=dtype, provenance=provenance)


def _provenance(request: Request, calibration: Calibration | None) -> dict[str, Any]:
    """cast.json: what made this checkpoint. Folder and file names only, no paths of a machine."""
    text = (
        {
            "files": calibration.files,
            "sequences": len(calibration.ids),
            "context": calibration.ids.shape[1],
            "sha256": calibration.sha256,
            "seed": request.seed,
        }
        if calibration
        else None
    )
    return {
        "method": f"one-shot {request.method}",
        "source": request.model.resolve().name,
        "sparsity": request.pattern,
        **({"calibration": text} if text else {}),
        "versions": versions(),
    }
