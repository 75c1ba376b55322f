"""Benchmarks without a server: requests handed to the engine at once, timed until all are answered.

`vllm bench latency` (one batch, several times) and `vllm bench throughput` (many requests, once) on
each engine, one process each. What comes of it is in offline_results.py.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cast_serve.bench.arguments import require_one
from cast_serve.bench.serving.engines import Engine, common_flags
from cast_serve.bench.serving.models import ServedModel, find_served_model
from cast_serve.bench.serving.offline_results import Row, load_or_empty, print_rows, speedup
from cast_serve.bench.serving.process import end, start
from cast_serve.bench.serving.server import ServerError, Startup
from cast_serve.bench.serving.setting import Setting

# An engine's start and the longest job; on a CPU minutes.
JOB_SECONDS = 3600


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process measures.

    Attributes:
        benchmark: latency or throughput.
        requests: handed over at once.
        flags: of `vllm bench`, beside those that every job is given.
    """

    benchmark: str
    requests: int
    input_len: int
    output_len: int
    flags: tuple[str, ...]

    def command_flags(self, result: Path) -> list[str]:
        lengths = ["--input-len", str(self.input_len), "--output-len", str(self.output_len)]
        return [*lengths, *self.flags, "--output-json", str(result)]

    def seconds(self, result: dict[str, Any]) -> list[float]:
        """From the JSON that `vllm bench` saves: seconds until all requests were answered."""
        if self.benchmark == "latency":
            return result["latencies"]
        return [result["elapsed_time"]]


def add_lengths(
    parser: argparse.ArgumentParser, *, requests: str, input_len: int, output_len: int
) -> None:
    """The arguments --requests, --input-len and --output-len."""
    parser.add_argument(
        "--requests", default=requests, metavar="1,8", help="at once; an engine start for each"
    )
    parser.add_argument("--input-len", type=int, default=input_len, metavar="TOKENS")
    parser.add_argument("--output-len", type=int, default=output_len, metavar="TOKENS")


def _require_room(given: argparse.Namespace, model: ServedModel) -> None:
    """Raise ValueError for lengths that an engine would refuse after its start."""
    require_one("--input-len", given.input_len)
    require_one("--output-len", given.output_len)
    if given.input_len + given.output_len > model.max_model_len:
        raise ValueError(
            f"--input-len {given.input_len} --output-len {given.output_len}: {model.name} is "
            f"served with {model.max_model_len} tokens a request at most"
        )


def run(given: argparse.Namespace, jobs: Sequence[Job], flags: Sequence[str]) -> int:
    """Measure `jobs` on the engines of the command line `given`; print and write everything.

    Returns:
        Exit status: 0 measured, 1 a job failed, 2 cannot run as asked.
    """
    console = Console(width=160, highlight=False)
    benchmark = jobs[0].benchmark
    try:
        model = find_served_model(given.model)
        _require_room(given, model)
        setting = Setting.find(engines=given.engines, commit=given.commit, logs=given.logs)
        path = setting.result_path(benchmark, given.out)
        results = setting.earlier(path, load_or_empty)
    except ValueError as error:
        print(f"bench_{benchmark}: {error}", file=sys.stderr)
        return 2
    setting.begin(console)
    env, logs = setting.env, setting.logs
    every = [*common_flags(model, on_gpu=setting.on_gpu), *flags]
    failed: dict[str, str] = {}
    rows: list[Row] = []
    for engine in setting.engines:
        folder = engine.write_model(model, logs / "models")
        for job in jobs:
            name = f"{engine.name}-{job.requests}"
            try:
                seconds, startup = measure(engine, folder, job, every, logs / name)
            except ServerError as error:
                failed[name] = error.reason
                print(f"bench_{benchmark}: {name}: {error}", file=sys.stderr, flush=True)
                continue
            row = Row(
                engine=engine.name,
                model=model.name,
                requests=job.requests,
                input_len=job.input_len,
                output_len=job.output_len,
                iterations=len(seconds),
                seconds=statistics.median(seconds),
                spread_s=max(seconds) - min(seconds),
                output_tokens_per_s=job.requests * job.output_len / statistics.median(seconds),
                weights_gib=startup.weights_gib,
                kv_tokens=startup.kv_tokens,
                flags=" ".join(flags),
                run=env["run"],
            )
            rows.append(row)
            results = results.merge(env, [row])
            results.save(path)
            console.print(f"{name}: {row.seconds:.3f} s, {row.output_tokens_per_s:.1f} tokens/s")
    if rows:
        print_rows(rows, f"{benchmark} of {model.name} on {env['gpu']}", console)
    summary = {
        "gpu": env["gpu"],
        "commit": env["commit"],
        "speedup": {
            f"{row.engine} {row.requests}": round(ratio, 3)
            for row in rows
            if (ratio := speedup(row, rows)) is not None
        },
        "left_out": setting.left_out | failed,
        "files": [str(path)] if rows else [],
    }
    print(json.dumps(summary))
    return 1 if failed else 0


def measure(
    engine: Engine, model: Path, job: Job, flags: Sequence[str], logs: Path
) -> tuple[list[float], Startup]:
    """Run one job in a process of its own; seconds until all requests were answered.

    Raises:
        ServerError: it ended without a result, or took too long; with the end of its log.
    """
    logs.mkdir(parents=True, exist_ok=True)
    result, log = logs / "result.json", logs / "log"
    result.unlink(missing_ok=True)
    command = engine.offline_command(job.benchmark, model, [*flags, *job.command_flags(result)])
    with log.open("w") as output:
        process = start(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        status = process.wait(JOB_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ServerError(f"not over after {JOB_SECONDS} s; see {log}") from error
    finally:
        end(process)
    said = log.read_text(errors="replace")
    if status != 0 or not result.exists():
        raise ServerError(f"ended with status {status}; see {log}", said)
    return job.seconds(json.loads(result.read_text())), Startup.of(said)
