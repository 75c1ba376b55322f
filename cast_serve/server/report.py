"""The start-up report: what the headers of a checkpoint say will be served, and how."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from vllm.platforms import current_platform

from cast_serve.config import READS_CHECKPOINT
from cast_serve.envs import ForcedKernel, forced_kernel
from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.model_loaders.formats import QUANT_METHOD
from cast_serve.model_loaders.layers import find_layers, require_served
from cast_serve.model_loaders.summary import Summary, summarise

UNPACKED = "unpacked while loading, then run dense by vLLM"
PACKED = "packed where a 2:4 kernel runs their shape, else dense; the log says which"


def report(model: str, quantization: str | None, cache_bytes: int | None) -> None:
    """Check the headers of the checkpoint `model` and print what will be served.

    Reads no weights. A model that is not a folder is left to vLLM, which downloads it.

    Args:
        model: folder, the name of a model on a hub, or the URL of one that vLLM streams.
        quantization: the value of --quantization.
        cache_bytes: the value of --kv-cache-memory-bytes.

    Raises:
        CheckpointError: the checkpoint cannot be served.
    """
    console = Console(stderr=True)
    if not _is_here(model) and not _looks_like_path(model):
        found = f"{model} is no folder here: vLLM looks it up, and it is checked on loading."
        console.print(found, markup=False)
        return
    checkpoint = Checkpoint.open(Path(model))
    layers = find_layers(checkpoint)
    require_served(checkpoint, layers)
    summary = summarise(checkpoint, layers=layers)
    outlook = outlook_of_sparse(forced_kernel(), on_gpu=current_platform.is_cuda())
    table = _table(summary, quantization, outlook)
    if cache_bytes:
        size = f"{cache_bytes / 2**30:.1f} GiB"
        table.add_row("KV cache", f"{size} on each rank; --kv-cache-memory-bytes changes it")
    console.print(table)


def why_unchecked(args: argparse.Namespace) -> str | None:
    """Why `report` would not speak of what vLLM loads by `args`; None if it would."""
    if args.load_format.lower() not in READS_CHECKPOINT:
        return f"--load-format {args.load_format} does not load config.json with *.safetensors"
    if isinstance(args.hf_overrides, dict) and "quantization_config" in args.hf_overrides:
        return "--hf-overrides has another quantization_config than its config.json"
    return None


def outlook_of_sparse(forced: ForcedKernel | None, *, on_gpu: bool) -> str:
    """What becomes of sparse layers (linear.py), as far as it is known before they are loaded.

    Args:
        forced: the kernel that CAST_SERVE_KERNEL names.
        on_gpu: an NVIDIA GPU; other devices have no 2:4 kernels.
    """
    if forced is not None:
        return f"packed, all run by one kernel: {forced}"
    return PACKED if on_gpu else UNPACKED


def _is_here(model: str) -> bool:
    """Whether there is something of that name; also where permission to look is missing."""
    try:
        return Path(model).exists()
    except OSError:
        return True


def _looks_like_path(model: str) -> bool:
    """Whether a folder was meant: neither a hub's `name` or `owner/name`, nor a URL, as of S3."""
    return "://" not in model and (model.startswith((".", "/", "~")) or model.count("/") > 1)


def _table(summary: Summary, quantization: str | None, outlook: str) -> Table:
    rows = Table.grid(padding=(0, 2))
    rows.add_row("cast-serve", escape(str(summary.path)))
    rows.add_row("format", f"{summary.format}, {', '.join(summary.dtypes)}")
    sparse, dense = len(summary.sparse), len(summary.dense)
    if not summary.needs_flag:
        rows.add_row("layers", f"{sparse} sparse, {dense} dense")
        rows.add_row("weights", _bytes(summary.loaded_bytes, summary.dense_bytes))
        if summary.format.quantized is not None:
            outlook = f"dequantized while loading; {outlook}"
        rows.add_row("sparse layers", outlook)
    elif quantization == QUANT_METHOD:
        rows.add_row("layers", f"{sparse} sparse if their weights are 2:4, {dense} dense")
        rows.add_row("weights", f"at best {_bytes(summary.loaded_bytes, summary.dense_bytes)}")
        rows.add_row("2:4 layers", outlook)
    else:
        rows.add_row("layers", f"{sparse + dense} dense: config.json declares no 2:4 layers")
        rows.add_row("", "if `cast-model check` finds them, add --quantization cast")
    return rows


def _bytes(stored: int, dense: int) -> str:
    share = f" ({stored / dense:.1%})" if dense else ""
    return f"{stored / 2**20:,.1f} MiB packed, {dense / 2**20:,.1f} MiB dense{share}"
