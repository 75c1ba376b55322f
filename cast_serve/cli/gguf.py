"""A GGUF file as a Hugging Face checkpoint folder, its weights dequantized."""

import struct
import sys
from importlib.util import find_spec
from pathlib import Path

from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.model_loaders.write import new_folder
from cast_serve.trainer.errors import first_line

_MAGIC = b"GGUF"


def import_gguf(source: Path, output: Path, *, dtype: str) -> None:
    """Write the model and tokenizer in a GGUF file to the new folder `output`.

    Args:
        source: the file, or a folder with one GGUF file in it.
        dtype: name of the torch dtype that weights are dequantized to.

    Raises:
        CheckpointError: no GGUF file, or one that transformers cannot read; no `gguf` package.
    """
    file = _find(source)
    if find_spec("gguf") is None:
        raise CheckpointError(
            file, "reading GGUF needs the package gguf; run `pip install 'cast-serve[train]'`"
        )
    with new_folder(output) as folder:
        _save(file, folder, dtype)


def _find(source: Path) -> Path:
    if source.is_dir():
        files = sorted(source.glob("*.gguf"))
        if len(files) != 1:
            raise CheckpointError(source, f"holds {len(files)} .gguf files; name one")
        source = files[0]
    if not source.is_file():
        raise CheckpointError(source, "no such file")
    try:
        with source.open("rb") as stream:
            magic = stream.read(len(_MAGIC))
    except OSError as error:
        raise CheckpointError(source, f"cannot be read: {error.strerror}") from error
    if magic != _MAGIC:
        raise CheckpointError(source, "is not a GGUF file: it does not start with GGUF")
    return source


def _save(file: Path, folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from cast_serve.trainer.source import LOADING_ERRORS

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        read = AutoModelForCausalLM.from_pretrained(**place, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(**place)
        # transformers marks a model read from GGUF as quantized and refuses to save it, so its
        # weights move to a model made from the config.
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model.load_state_dict(read.state_dict(), assign=True)
    # Where the lengths in it lead beyond its end.
    except struct.error as error:
        raise CheckpointError(file, f"is cut off or damaged: {error}; get it again") from error
    except LOADING_ERRORS as error:
        raise CheckpointError(file, f"transformers cannot read it: {first_line(error)}") from error
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
