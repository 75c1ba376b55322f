"""How much faster than dense is a 2:4 linear layer, at every number of tokens?

    python -m bench.bench_linear                                     all models, bf16; minutes
    python -m bench.bench_linear --models Llama-3.1-8B --quick
    python -m bench.bench_linear --all-kernels --tokens 1,64,1024    beside the op's choice, each
                                                                     kernel at its best config

Dense     cuBLAS through torch.nn.functional.linear, on the same weights unpacked, in the same run.
Roof      Bytes (values, one metadata, x, y) at the speed of a device-to-device copy, or the product
          at twice cuBLAS's peak, both measured in the same run. Stored are 36 of 64 bits, so the
          limit is 1.78x where bytes bind, 2x where arithmetic does.
Method    bench/timing.py. Every point is judged against fp32 before it is timed; one that is wrong
          ends the run.
Writes    linear-GPU.{json,md,png} under --out, the JSON after every model; rows of other models and
          dtypes stay. The last line on stdout is one JSON object.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cast_serve.bench import environment, report
from cast_serve.bench.accuracy import WrongResult
from cast_serve.bench.arguments import numbers, writable_folder
from cast_serve.bench.linear_results import Row, load_or_empty
from cast_serve.bench.make_table import make_table
from cast_serve.bench.paths import RESULTS, known
from cast_serve.bench.points import Forced, Rates, measure_layer
from cast_serve.bench.render import render
from cast_serve.bench.shapes import MODELS, TOKENS, Model, find_model
from cast_serve.bench.timing import copy_gbps, dense_tflops
from cast_serve.kernels.registry import KERNELS
from cast_serve.kernels.selection import NoKernel

QUICK_TOKENS = (1, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line, checked."""

    models: tuple[Model, ...]
    tokens: tuple[int, ...]
    dtype: torch.dtype
    forced: tuple[Forced, ...]
    budget_ms: float
    tune: bool
    out: Path
    commit: str | None


def parse(arguments: Sequence[str] | None) -> Options:
    """Options of a command line.

    Raises:
        ValueError: a model, kernel or number of tokens that there is not.
    """
    parser = argparse.ArgumentParser(
        prog="cast-bench linear",
        description="Time 2:4 linear layers against cuBLAS and write bench/results.",
    )
    names = ",".join(model.name for model in MODELS)
    tokens = ",".join(map(str, TOKENS))
    parser.add_argument("--models", default=names, metavar="A,B", help=f"of {names}")
    parser.add_argument("--tokens", metavar="1,8", help=f"default {tokens}")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument(
        "--kernel",
        action="append",
        default=[],
        metavar="NAME[:CONFIG]",
        help=f"add rows of this kernel, at its best config or CONFIG; of {', '.join(KERNELS)}",
    )
    parser.add_argument("--all-kernels", action="store_true", help="--kernel for each of them")
    parser.add_argument("--quick", action="store_true", help="fewer tokens and replays")
    parser.add_argument("--tune", action="store_true", help="first write kernels/tables anew")
    parser.add_argument("--out", type=writable_folder, default=RESULTS, metavar="DIR")
    parser.add_argument("--commit", help="for a checkout without git")
    given = parser.parse_args(arguments)
    chosen = list(KERNELS) if given.all_kernels else given.kernel
    default = QUICK_TOKENS if given.quick else TOKENS
    return Options(
        models=tuple(find_model(name) for name in given.models.split(",")),
        tokens=tuple(numbers("--tokens", given.tokens)) if given.tokens else default,
        dtype=getattr(torch, given.dtype),
        forced=tuple(Forced.parse(name) for name in chosen),
        budget_ms=20 if given.quick else 60,
        tune=given.tune,
        out=given.out,
        commit=given.commit,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, 1 a kernel is wrong, 2 cannot run here or as asked."""
    try:
        options = parse(arguments)
        device = environment.require_gpu()
        if os.environ.get("CAST_SERVE_KERNEL"):
            raise ValueError("CAST_SERVE_KERNEL is set and would be the choice: use --kernel")
    except ValueError as error:
        print(f"bench_linear: {error}", file=sys.stderr)
        return 2
    # Wide enough for a table a model where stdout is a file, too.
    console = Console(width=200, highlight=False)
    if options.tune:
        make_table(
            options.models, dtype=options.dtype, device=device, seconds=float("inf"), again=True
        )
    try:
        with torch.inference_mode():
            summary = bench(options, device, console)
    except WrongResult as error:
        print(f"bench_linear: {error}; nothing more is timed", file=sys.stderr)
        return 1
    print(json.dumps(summary))
    return 0


def bench(options: Options, device: torch.device, console: Console) -> dict[str, Any]:
    """Measure, print and write everything; returns the summary."""
    rates = Rates(copy_gbps=copy_gbps(device), dense_tflops=dense_tflops(device, options.dtype))
    env = environment.describe(device, commit=options.commit) | {
        "copy_gbps": rates.copy_gbps,
        "dense_tflops": rates.dense_tflops,
    }
    report.print_environment(env, console)
    path = options.out / f"linear-{environment.slug(env['gpu'])}.json"
    results = load_or_empty(known(path))
    measured: list[Row] = []
    for model in options.models:
        rows = measure_model(model, options, device, rates, env["run"], console)
        report.print_model(model, rows, console)
        measured += rows
        results = results.merge(env, rows)
        results.save(path)
    files = [path, *render(path)] if measured else []
    return report.summarize(env, options.models, measured) | {"files": [str(f) for f in files]}


def measure_model(
    model: Model,
    options: Options,
    device: torch.device,
    rates: Rates,
    run: str,
    console: Console,
) -> list[Row]:
    """The rows of a model's layers; a layer that no kernel supports is named and left out."""
    rows: list[Row] = []
    # Memory of one layer's copies is given back before the next one counts what is free.
    release: Callable[[], None] = torch.cuda.empty_cache
    for layer in model.layers:
        try:
            rows += measure_layer(
                model.name,
                layer,
                tokens=options.tokens,
                dtype=options.dtype,
                device=device,
                forced=options.forced,
                rates=rates,
                budget_ms=options.budget_ms,
                run=run,
            )
        except NoKernel as error:
            console.print(f"{model.name} {layer.name}: {error}")
        release()
    return rows


if __name__ == "__main__":
    sys.exit(main())
