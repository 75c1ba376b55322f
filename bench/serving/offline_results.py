"""What bench_latency and bench_throughput measured: rows, their file, and the table of both."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cast_serve.bench.markdown import table_by_model, with_spread
from cast_serve.bench.result_file import ResultFile, positive, read, sibling
from cast_serve.bench.serving.engines import BASELINE

BENCHMARKS = ("latency", "throughput")
HEADER = (
    *("requests", "in", "out", "engine", "seconds"),
    *("output tokens/s", "weights GiB", "KV tokens"),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A job on an engine.

    Attributes:
        iterations: how often it was timed; `seconds` is the median, `spread_s` largest less least.
        output_tokens_per_s: of all requests.
        weights_gib, kv_tokens: as in serving/results.py.
    """

    engine: str
    model: str
    requests: int
    input_len: int
    output_len: int
    iterations: int
    seconds: float
    spread_s: float
    output_tokens_per_s: float
    weights_gib: float | None
    kv_tokens: int
    flags: str
    run: str

    @property
    def key(self) -> tuple[str, str, int, int, int, str]:
        lengths = (self.requests, self.input_len, self.output_len)
        return (self.engine, self.model, *lengths, self.flags)


def load_or_empty(path: Path) -> ResultFile[Row]:
    return read(path, Row, _fault) if path.exists() else ResultFile()


def speedup(row: Row, rows: Sequence[Row]) -> float | None:
    """Seconds of the baseline / seconds of `row`; None for the baseline, or without one."""
    for other in rows:
        if other.key == (BASELINE, *row.key[1:]) and other is not row:
            return other.seconds / row.seconds
    return None


def beside(file: Path) -> dict[str, Path]:
    """By benchmark, the results that there are of the GPU of a serve-GPU.json."""
    found = {name: sibling(file, name) for name in BENCHMARKS}
    return {name: path for name, path in found.items() if path.exists()}


def lines(file: Path) -> list[str]:
    """In Markdown, a table for each model and flags of a result file, and what they ran on."""
    results = load_or_empty(file)
    rows = sorted(results.rows, key=lambda row: (row.requests, row.engine))
    return [*table_by_model(HEADER, rows, cells), results.ran_on()]


def print_rows(rows: Sequence[Row], title: str, console: Console) -> None:
    """A line an engine and number of requests; in brackets how much faster than dense bf16."""
    shown = Table(title=f"{title}: median ± spread (x dense-bf16)")
    for column in HEADER:
        shown.add_column(column, justify="left" if column == "engine" else "right")
    for requests in dict.fromkeys(row.requests for row in rows):
        for row in rows:
            if row.requests == requests:
                shown.add_row(*cells(row, rows))
        shown.add_section()
    console.print(shown)


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """The cells under `HEADER`; the row is compared with the baseline's among `rows`."""
    ratio = speedup(row, rows)
    return [
        str(row.requests),
        str(row.input_len),
        str(row.output_len),
        row.engine,
        with_spread(row.seconds, row.spread_s, times=row.iterations, digits=3),
        f"{row.output_tokens_per_s:.0f}" + (f" ({ratio:.2f})" if ratio else ""),
        "-" if row.weights_gib is None else f"{row.weights_gib:.2f}",
        f"{row.kv_tokens:,}",
    ]


def _fault(row: Row) -> str | None:
    numbers = (row.seconds, row.output_tokens_per_s, row.kv_tokens, row.requests)
    return None if positive(*numbers) else "times, rates and sizes must be numbers above zero"
