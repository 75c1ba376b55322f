"""The arguments that bench_serve, bench_latency and bench_throughput have alike."""

import argparse
import os
from collections.abc import Sequence

from cast_serve.bench.arguments import writable_folder
from cast_serve.bench.paths import RESULTS
from cast_serve.bench.serving.engines import ENGINES
from cast_serve.bench.serving.models import MODELS


def split_flags(arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """What stands before a `--`, and what after it."""
    if "--" not in arguments:
        return list(arguments), ()
    index = list(arguments).index("--")
    return list(arguments[:index]), tuple(arguments[index + 1 :])


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, --engines, --out, --logs and --commit."""
    models = ", ".join(model.name for model in MODELS)
    engines = ",".join(engine.name for engine in ENGINES)
    parser.add_argument("--model", default=MODELS[0].name, help=f"shape, of {models}")
    parser.add_argument("--engines", default=engines, metavar="A,B", help=f"of {engines}")
    parser.add_argument("--out", type=writable_folder, default=RESULTS, metavar="DIR")
    parser.add_argument(
        "--logs",
        type=writable_folder,
        metavar="DIR",
        help="logs and model folders; default: a temporary one",
    )
    parser.add_argument("--commit", help="for a checkout without git")


def refuse_forced_kernel(*, on_gpu: bool) -> None:
    """Check that the op's own choice is what will be measured.

    Raises:
        ValueError: CAST_SERVE_KERNEL names another. Not on a CPU, where the sparse op runs only so.
    """
    forced = os.environ.get("CAST_SERVE_KERNEL")
    if on_gpu and forced:
        raise ValueError(f"CAST_SERVE_KERNEL={forced} is set and would be measured: unset it")
