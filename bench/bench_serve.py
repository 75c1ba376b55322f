"""How much faster than dense is a 2:4 model behind the OpenAI-compatible server?

    python -m bench.bench_serve                              Llama-3.1-8B, all engines and workloads
    python -m bench.bench_serve --engines dense-bf16,sparse-bf16 --workloads c1,c16 --repeats 1
    python -m bench.bench_serve --workloads c64 --breakdown c64       and where a step's time goes
    python -m bench.bench_serve --model tiny --workloads smoke        on a CPU, a minute
    python -m bench.bench_serve -- --tensor-parallel-size 2           flags for every server

Engines   dense-bf16 and dense-fp8 (quantized while loading, W8A8) are stock vLLM, sparse-bf16 is
          cast-serve; one after the other on the same machine with the same flags. cast-serve turns
          triton.enable_pdl of torch.compile on, which stock vLLM leaves off.
Roof      TPOT at one request cannot gain more than the step's bytes do: a 2:4 layer is 0.5625 of a
          dense one, and lm_head, attention and the KV cache stay what they are.
Method    Weights are random (`--load-format dummy`), their shapes the model's. Each workload is
          run --repeats times by vllm.benchmarks.serve, greedy, with eos ignored and without prefix
          caching; prompts are the same for every engine. Shown is the median of the repeats.
          Of the mean TTFT it is also said how much passes in the engine: the rest is the front
          end, which no kernel makes faster.
Breakdown After all workloads, those named run once more under torch.profiler; GPU time by kind of
          kernel, a step.
Writes    serve-GPU.json under --out, after every workload; at the end its .md and .png. Breakdowns
          go to breakdown-GPU.json. Rows of other engines, models and workloads stay, if they were
          measured on this machine with these versions. The last line on stdout is one JSON object.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cast_serve.bench.arguments import require_one
from cast_serve.bench.paths import known
from cast_serve.bench.serving import breakdown
from cast_serve.bench.serving.arguments import (
    add_common_arguments,
    split_flags,
)
from cast_serve.bench.serving.client import SERVED_NAME, Client, MeasurementError
from cast_serve.bench.serving.engines import Engine, common_flags
from cast_serve.bench.serving.floors import WEIGHTS, judge
from cast_serve.bench.serving.models import ServedModel, find_served_model
from cast_serve.bench.serving.render import can_plot, in_order, render
from cast_serve.bench.serving.report import print_rows, summarize
from cast_serve.bench.serving.results import Row, load_or_empty
from cast_serve.bench.serving.server import Server, ServerError
from cast_serve.bench.serving.setting import Setting
from cast_serve.bench.serving.trace import TraceError
from cast_serve.bench.serving.workloads import SMOKE, WORKLOADS, Workload, find_workloads


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line, checked."""

    model: ServedModel
    engines: str
    workloads: tuple[Workload, ...]
    breakdowns: tuple[Workload, ...]
    repeats: int
    out: Path
    logs: Path
    commit: str | None
    flags: tuple[str, ...]


def parse(arguments: Sequence[str]) -> Options:
    """Options of a command line; what follows `--` is for the servers.

    Raises:
        ValueError: a model or workload that there is not, or no repeats.
    """
    own, flags = split_flags(arguments)
    parser = argparse.ArgumentParser(
        prog="cast-bench serve",
        description="Measure dense vLLM and cast-serve with vllm.benchmarks.serve.",
        epilog="Flags after -- go to every server, such as -- --tensor-parallel-size 2",
    )
    add_common_arguments(parser)
    names = ",".join(workload.name for workload in WORKLOADS)
    parser.add_argument(
        "--workloads", default=names, metavar="A,B", help=f"of {names},{SMOKE.name}"
    )
    parser.add_argument(
        "--breakdown", metavar="A,B", help="profile these workloads, too; default: none"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of each workload")
    given = parser.parse_args(own)
    require_one("--repeats", given.repeats)
    breakdowns = find_workloads(given.breakdown) if given.breakdown else ()
    breakdown.require_steady(breakdowns)
    return Options(
        model=find_served_model(given.model),
        engines=given.engines,
        workloads=find_workloads(given.workloads),
        breakdowns=breakdowns,
        repeats=given.repeats,
        out=given.out,
        logs=given.logs or Path(tempfile.mkdtemp(prefix="cast-bench-")),
        commit=given.commit,
        flags=flags,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, 1 an engine or workload failed, 2 cannot run as asked."""
    # Wide enough for the table where stdout is a file, too.
    console = Console(width=160, highlight=False)
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        setting = Setting.find(engines=options.engines, commit=options.commit, logs=options.logs)
        run = Run(options, setting, console)
    except ValueError as error:
        print(f"bench_serve: {error}", file=sys.stderr)
        return 2
    setting.begin(console)
    for engine in setting.engines:
        run.bench(engine)
    print(json.dumps(run.finish()))
    return 1 if run.failed else 0


class Run:
    """What was asked for, and what has been measured so far; saved whenever there is more."""

    def __init__(self, options: Options, setting: Setting, console: Console) -> None:
        self.options = options
        self.setting = setting
        self.env = setting.env
        self.console = console
        self.path = setting.result_path("serve", options.out)
        self.breakdown_path = breakdown.beside(self.path)
        self.results = setting.earlier(self.path, load_or_empty)
        self.breakdowns = breakdown.load_or_empty(known(self.breakdown_path))
        # By engine, or engine and workload, why.
        self.failed: dict[str, str] = {}

    def bench(self, engine: Engine) -> None:
        """Start `engine` and run everything on it; what fails is named, and the rest goes on."""
        options, logs = self.options, self.options.logs / engine.name
        folder = engine.write_model(options.model, options.logs / "models")
        common = common_flags(options.model, on_gpu=self.setting.on_gpu)
        flags = [*common, *options.flags, "--served-model-name", SERVED_NAME]
        if options.breakdowns:
            flags += breakdown.profiler_flags(logs / "traces")
        self.console.print(f"{engine.name}: starting", markup=False)
        words = options.model.vocabulary
        with (
            Server(engine.serve_command(folder, flags), logs / "server.log") as server,
            Client(folder, words, logs / "client", logs / "client.log") as client,
        ):
            try:
                server.wait()
                up = f"up after {server.start_s:.0f} s, {server.startup}"
                self.console.print(f"{engine.name}: {up}", markup=False)
                for workload in options.workloads:
                    self._measure(engine, workload, server, client)
                for workload in options.breakdowns:
                    self._profile(engine, workload, server, client)
            except ServerError as error:
                self._report(engine.name, error)

    def _measure(self, engine: Engine, workload: Workload, server: Server, client: Client) -> None:
        try:
            measured = [
                client.measure(server.url, workload, repeat=repeat)
                for repeat in range(self.options.repeats)
            ]
        except MeasurementError as error:
            self._report(f"{engine.name} {workload.name}", error)
            return
        row = Row.of(
            engine=engine.name,
            model=self.options.model.name,
            workload=workload,
            measured=measured,
            startup=server.startup,
            start_s=server.start_s,
            flags=self.options.flags,
            run=self.env["run"],
        )
        self.results = self.results.merge(self.env, [row])
        self.results.save(self.path)
        tokens = " ".join(f"{one.output_tokens_per_s:.1f}" for one in measured)
        tpot = "" if row.tpot_ms is None else f"TPOT {row.tpot_ms:.2f} ms, "
        ttft = f"TTFT {row.ttft_ms:.1f} ms"
        if row.ttft_engine_ms is not None:
            ttft += f" (mean {row.ttft_mean_ms:.1f}, {row.ttft_engine_ms:.1f} in the engine)"
        line = f"{row.engine} {row.workload}: {ttft}, {tpot}{tokens} tokens/s"
        self.console.print(line, markup=False)

    def _profile(self, engine: Engine, workload: Workload, server: Server, client: Client) -> None:
        traces = self.options.logs / engine.name / "traces"
        try:
            found = breakdown.profile(server.url, client, workload, traces)
        except (MeasurementError, TraceError) as error:
            self._report(f"{engine.name} breakdown of {workload.name}", error)
            return
        row = breakdown.Row(
            engine=engine.name,
            model=self.options.model.name,
            workload=workload.name,
            **vars(found),
            flags=" ".join(self.options.flags),
            run=self.env["run"],
        )
        self.breakdowns = self.breakdowns.merge(self.env, [row])
        self.breakdowns.save(self.breakdown_path)

    def finish(self) -> dict[str, Any]:
        """Print the tables, render the files, and return the summary."""
        gpu, shown = self.env["gpu"], (self.options.model.name, " ".join(self.options.flags))
        # Rows of other engines, too: one engine a run is how a short loan of a GPU is used.
        rows = in_order(row for row in self.results.rows if (row.model, row.flags) == shown)
        profiled = [row for row in self.breakdowns.rows if (row.model, row.flags) == shown]
        if rows:
            print_rows(rows, gpu, self.console)
        breakdown.print_rows(profiled, f"{shown[0]} on {gpu}", self.console)
        missed = [judged.floor for judged in judge(rows, gpu) if not judged.met]
        slow = {floor.workload for floor in missed if floor.metric != WEIGHTS}
        unexplained = slow - {row.workload for row in profiled}
        if unexplained:
            names = ",".join(sorted(unexplained))
            self.console.print(f"--breakdown {names} says where the time of missed floors is")
        files = [path for path in (self.path, self.breakdown_path) if path.exists()]
        if self.path.exists() and can_plot(self.console):
            files += render(self.path)
        summary = summarize(self.env, rows, self.setting.left_out | self.failed)
        return summary | {"files": [str(file) for file in files]}

    def _report(self, name: str, error: Exception) -> None:
        reason = error.reason if isinstance(error, ServerError) else str(error)
        self.failed[name] = reason.partition("\n")[0]
        print(f"bench_serve: {name}: {error}", file=sys.stderr)
        print(f"bench_serve: see {self.options.logs}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
