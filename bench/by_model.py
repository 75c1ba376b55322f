"""A benchmark that measures model after model and keeps its rows in one file: optim, train."""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cast_serve.bench import environment
from cast_serve.bench.arguments import writable_folder
from cast_serve.bench.decoders import DECODERS, SMALL, Decoder
from cast_serve.bench.paths import RESULTS, known
from cast_serve.bench.result_file import ResultFile, RowType, read
from cast_serve.bench.shapes import find_named


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """--models, --out and --commit."""
    names = ",".join(model.name for model in DECODERS)
    parser.add_argument("--models", metavar="A,B", help=f"of {names}, small; default: those two")
    parser.add_argument(
        "--out", type=writable_folder, metavar="DIR", help="default on a GPU: bench/results"
    )
    parser.add_argument("--commit", help="for a checkout without git")


def find_device() -> torch.device:
    """The GPU that is current, or the CPU where there is none."""
    on_gpu = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def find_models(names: str | None, device: torch.device) -> list[Decoder]:
    """The models of "A,B"; None: all on a GPU, a small one on a CPU.

    Raises:
        ValueError: there is no such model; lists those there are.
    """
    everything = ",".join(model.name for model in DECODERS)
    chosen = names or (everything if device.type == "cuda" else SMALL.name)
    return [find_named(name, (*DECODERS, SMALL)) for name in chosen.split(",")]


def run(
    name: str,
    models: Iterable[Decoder],
    env: dict[str, Any],
    *,
    row_type: type[RowType],
    fault: Callable[[RowType], str | None],
    measure: Callable[[Decoder], Sequence[RowType]],
    show: Callable[[Sequence[RowType]], Table],
    summarize: Callable[[dict[str, Any], Sequence[RowType]], dict[str, Any]],
    device: torch.device,
    out: Path | None,
) -> None:
    """Measure every model, print its table, save NAME-GPU.json after each; JSON last."""
    folder = out or (RESULTS if device.type == "cuda" else None)
    path = folder / f"{name}-{environment.slug(env['gpu'])}.json" if folder else None
    results = ResultFile[RowType]()
    if path is not None and known(path).exists():
        results = read(known(path), row_type, fault)
    console = Console(width=140, highlight=False)
    measured: list[RowType] = []
    for model in models:
        rows = measure(model)
        console.print(show(rows))
        measured += rows
        if path is not None:
            results = results.merge(env, rows)
            results.save(path)
    print(json.dumps(summarize(env, measured) | {"files": [str(path)] if path else []}))
