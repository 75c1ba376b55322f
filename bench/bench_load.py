"""How long does loading take, and what does it leave in memory, dense and 2:4?

    python -m bench.bench_load                                         Llama-3.1-8B; five minutes
    python -m bench.bench_load --model tiny                            on a CPU, a minute
    python -m bench.bench_load --checkpoints DIR -- --tensor-parallel-size 2

Method    Writes a random 2:4 checkpoint packed and dense (26 GB for Llama-3.1-8B), unless
          --checkpoints has it, and starts each engine on it --repeats times. The first start is
          not counted: it reads the disk, and compiles kernels; the others find the files in the
          page cache.
Roof      Bytes read: a packed checkpoint of Llama-3.1-8B has 0.62 of the dense one's.
Writes    load-GPU.json under --out. The last line on stdout is one JSON object.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from cast_serve.bench.arguments import require_one, writable_folder
from cast_serve.bench.serving.arguments import (
    add_common_arguments,
    split_flags,
)
from cast_serve.bench.serving.engines import BASELINE, Engine, common_flags
from cast_serve.bench.serving.loading_results import Row, load_or_empty, of_dense, print_rows
from cast_serve.bench.serving.models import ServedModel, find_served_model, write_model
from cast_serve.bench.serving.server import Server, ServerError
from cast_serve.bench.serving.setting import Setting
from cast_serve.bench.serving.weights import write_weights
from cast_serve.model_loaders.write import new_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, 1 an engine failed, 2 cannot run as asked."""
    console = Console(width=160, highlight=False)
    own, flags = split_flags(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="cast-bench load",
        description="Time the loading of real files, dense vLLM and cast-serve.",
        epilog="Flags after -- go to every server",
    )
    add_common_arguments(parser)
    parser.set_defaults(engines="dense-bf16,sparse-bf16")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="counted starts")
    parser.add_argument(
        "--checkpoints", type=writable_folder, metavar="DIR", help="default: under --logs"
    )
    given = parser.parse_args(own)
    try:
        require_one("--repeats", given.repeats)
        model = find_served_model(given.model)
        setting = Setting.find(engines=given.engines, commit=given.commit, logs=given.logs)
        path = setting.result_path("load", given.out)
        results = setting.earlier(path, load_or_empty)
    except ValueError as error:
        print(f"bench_load: {error}", file=sys.stderr)
        return 2
    setting.begin(console)
    env, logs = setting.env, setting.logs
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for engine in setting.engines:
        folder = checkpoint(engine, model, given.checkpoints or logs / "checkpoints")
        try:
            row = measure(engine, model, folder, given.repeats, flags, setting)
        except ServerError as error:
            failed[engine.name] = error.reason
            print(f"bench_load: {engine.name}: {error}", file=sys.stderr, flush=True)
            continue
        rows.append(row)
        results = results.merge(env, [row])
        results.save(path)
    if rows:
        print_rows(rows, f"Loading {model.name} on {env['gpu']}", console)
    baseline = next((row for row in rows if row.engine == BASELINE), None)
    summary = {
        "gpu": env["gpu"],
        "commit": env["commit"],
        "of_dense": {row.engine: of_dense(row, baseline) for row in rows if baseline},
        "left_out": setting.left_out | failed,
        "files": [str(path)] if rows else [],
    }
    print(json.dumps(summary))
    return 1 if failed else 0


def checkpoint(engine: Engine, model: ServedModel, folder: Path) -> Path:
    """The folder of `engine` under `folder`, made with its weights where it is not there yet."""
    path = engine.model_folder(model, folder)
    if not path.exists():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with new_folder(path) as made:
            write_model(model, made, sparse=engine.sparse)
            write_weights(model, made, sparse=engine.sparse, device=device)
        # This process would take the memory from the servers.
        torch.cuda.empty_cache()
    return path


def measure(
    engine: Engine,
    model: ServedModel,
    folder: Path,
    repeats: int,
    flags: Sequence[str],
    setting: Setting,
) -> Row:
    """Start `engine` once and then `repeats` times.

    Raises:
        ServerError: it did not start; with the end of its log.
    """
    given = common_flags(model, on_gpu=setting.on_gpu, dummy=False)
    command = engine.serve_command(folder, [*given, "--enforce-eager", *flags])
    logs = setting.logs / engine.name
    starts = []
    for number in range(repeats + 1):
        with Server(command, logs / f"server-{number}.log") as server:
            server.wait()
            starts.append((server.startup, server.start_s, server.host_gib()))
    loads = [startup.load_s for startup, *_ in starts[1:] if startup.load_s is not None]
    if not loads:
        raise ServerError(f"the log does not say how long loading took: {logs}")
    startup = starts[-1][0]
    return Row(
        engine=engine.name,
        model=model.name,
        repeats=repeats,
        load_s=statistics.median(loads),
        spread_s=max(loads) - min(loads),
        start_s=statistics.median(seconds for _, seconds, _ in starts[1:]),
        weights_gib=startup.weights_gib,
        kv_tokens=startup.kv_tokens,
        host_gib=max(host for *_, host in starts[1:]),
        checkpoint_gib=sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**30,
        flags=" ".join(flags),
        run=setting.env["run"],
    )


if __name__ == "__main__":
    sys.exit(main())
