"""Profiles a server under a workload: what its steps' time goes to, kind by kind.

breakdown-GPU.json (bench/result_file.py): a row an engine, model and workload.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cast_serve.bench.markdown import table
from cast_serve.bench.result_file import ResultFile, positive, read, sibling
from cast_serve.bench.serving.client import Client
from cast_serve.bench.serving.server import ServerError
from cast_serve.bench.serving.trace import Breakdown, breakdown, read_trace
from cast_serve.bench.serving.workloads import Workload

# Writing a trace of some hundred steps takes vLLM 5-30 s.
STOP_SECONDS = 300
# A step each.
PREFILLS = 8


@dataclass(frozen=True, kw_only=True)
class Row:
    """The breakdown of a workload's steps on an engine; see trace.Breakdown."""

    engine: str
    model: str
    workload: str
    steps: int
    step_ms: float
    parts_ms: dict[str, float]
    flags: str
    run: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        return (self.engine, self.model, self.workload, self.flags)


def profiler_flags(folder: Path) -> tuple[str, ...]:
    """What a server is given so that it can be profiled; traces go to `folder`.

    Nothing is recorded, and no step takes longer, until it is asked for (vLLM 0.26).
    """
    config = {
        "profiler": "torch",
        "torch_profiler_dir": str(folder.absolute()),
        "torch_profiler_with_stack": False,
        "torch_profiler_dump_cuda_time_total": False,
        "ignore_frontend": True,
    }
    return ("--profiler-config", json.dumps(config))


def require_steady(workloads: Iterable[Workload]) -> None:
    """Check that each consists of one kind of step.

    Raises:
        ValueError: one does not.
    """
    for workload in workloads:
        if workload.input_len is None:
            raise ValueError(f"--breakdown {workload.name}: its steps differ from each other")


def profile(url: str, client: Client, workload: Workload, traces: Path) -> Breakdown:
    """Run `workload` once under the profiler, with no more requests than it needs.

    Raises:
        ServerError: the server cannot be profiled, or wrote no trace.
        MeasurementError, TraceError: the workload failed, or has no step of its kind.
    """
    before = set(_traces(traces))
    count = PREFILLS if workload.is_prefill else workload.concurrency
    _post(f"{url}/start_profile")
    client.measure(url, replace(workload, num_prompts=count, num_warmups=0), repeat=0)
    _post(f"{url}/stop_profile")
    written = [path for path in _traces(traces) if path not in before]
    if not written:
        raise ServerError(f"the server wrote no trace into {traces}")
    # One a rank; they do the same.
    events = read_trace(written[0])
    prefills, decodes = (1, 0) if workload.is_prefill else (0, workload.concurrency)
    return breakdown(events, prefills=prefills, decodes=decodes)


def print_rows(rows: Sequence[Row], title: str, console: Console) -> None:
    """A table a workload: a line a kind, a column an engine."""
    for workload in dict.fromkeys(row.workload for row in rows):
        own = [row for row in rows if row.workload == workload]
        printed = Table(title=f"{title}: ms of a step of {workload}, profiled")
        printed.add_column("kind")
        for row in own:
            printed.add_column(row.engine, justify="right")
        for name in own[0].parts_ms:
            printed.add_row(name, *(f"{row.parts_ms[name]:.3f}" for row in own))
        printed.add_section()
        printed.add_row("step", *(f"{row.step_ms:.3f}" for row in own))
        console.print(printed)


def lines(file: Path) -> list[str]:
    """A Markdown table: a line an engine, model and workload, ms of a step by kind; the runs."""
    results = load_or_empty(file)
    kinds = list(results.rows[0].parts_ms)
    found = table(
        ["model", "workload", "engine", *kinds, "step", "steps"],
        [
            [
                f"{row.model}{f', `{row.flags}`' if row.flags else ''}",
                row.workload,
                row.engine,
                *(f"{row.parts_ms[kind]:.3f}" for kind in kinds),
                f"{row.step_ms:.3f}",
                str(row.steps),
            ]
            for row in results.rows
        ],
    )
    return [*found, "", results.ran_on()]


def beside(file: Path) -> Path:
    """The breakdowns that belong to a serve-GPU.json."""
    return sibling(file, "breakdown")


def load_or_empty(path: Path) -> ResultFile[Row]:
    return read(path, Row, _fault) if path.exists() else ResultFile()


def _traces(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.pt.trace.json*"))


def _post(url: str) -> None:
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, method="POST"), timeout=STOP_SECONDS
        ) as answer:
            answer.read()
    except (urllib.error.URLError, OSError) as error:
        raise ServerError(f"{url}: {error}") from error


def _fault(row: Row) -> str | None:
    return None if positive(row.steps, row.step_ms) else "steps and times must be above zero"
