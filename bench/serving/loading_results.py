"""What bench_load measured: rows, their file, and the table of both."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cast_serve.bench.markdown import table_by_model, with_spread
from cast_serve.bench.result_file import ResultFile, positive, read, sibling
from cast_serve.bench.serving.engines import BASELINE

HEADER = (
    *("engine", "load s", "start s", "weights GiB"),
    *("KV tokens", "host GiB", "disk GiB"),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Loading on an engine.

    Attributes:
        load_s: median over the repeats of what vLLM logs as loading; `spread_s` largest less least.
        start_s: median from the start of the process until it answers, without graphs.
        weights_gib: of one rank; None on a CPU, where vLLM does not log it.
        host_gib: largest resident set of a process, pages of the checkpoint's files included.
        checkpoint_gib: of the safetensors on disk.
    """

    engine: str
    model: str
    repeats: int
    load_s: float
    spread_s: float
    start_s: float
    weights_gib: float | None
    kv_tokens: int
    host_gib: float
    checkpoint_gib: float
    flags: str
    run: str

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.engine, self.model, self.flags)


def load_or_empty(path: Path) -> ResultFile[Row]:
    return read(path, Row, _fault) if path.exists() else ResultFile()


def beside(file: Path) -> Path:
    """Of the GPU of a serve-GPU.json."""
    return sibling(file, "load")


def of_dense(row: Row, dense: Row) -> dict[str, float]:
    """A row's numbers over those of stock vLLM on the dense checkpoint."""
    ratios = {
        "load_s": row.load_s / dense.load_s,
        "kv_tokens": row.kv_tokens / dense.kv_tokens,
        "host_gib": row.host_gib / dense.host_gib,
        "checkpoint_gib": row.checkpoint_gib / dense.checkpoint_gib,
    }
    if row.weights_gib and dense.weights_gib:
        ratios["weights_gib"] = row.weights_gib / dense.weights_gib
    return {name: round(ratio, 3) for name, ratio in ratios.items()}


def print_rows(rows: Sequence[Row], title: str, console: Console) -> None:
    """A line an engine; in brackets what part of dense bf16's."""
    shown = Table(title=f"{title}: median ± spread (of dense-bf16)")
    for column in HEADER:
        shown.add_column(column, justify="left" if column == "engine" else "right")
    for row in rows:
        shown.add_row(*cells(row, rows))
    console.print(shown)


def lines(file: Path) -> list[str]:
    """In Markdown, a table for each model and flags of a result file, and what they ran on."""
    results = load_or_empty(file)
    return [*table_by_model(HEADER, results.rows, cells), results.ran_on()]


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """The cells under `HEADER`; the row is compared with the baseline's among `rows`."""
    dense = next((other for other in rows if other.engine == BASELINE and other is not row), None)
    ratios = {} if dense is None else of_dense(row, dense)

    def cell(shown: str, name: str) -> str:
        return shown + (f" ({ratios[name]:.3f})" if name in ratios else "")

    weights = "-" if row.weights_gib is None else f"{row.weights_gib:.2f}"
    return [
        row.engine,
        cell(with_spread(row.load_s, row.spread_s, times=row.repeats, digits=2), "load_s"),
        f"{row.start_s:.0f}",
        cell(weights, "weights_gib"),
        cell(f"{row.kv_tokens:,}", "kv_tokens"),
        cell(f"{row.host_gib:.2f}", "host_gib"),
        cell(f"{row.checkpoint_gib:.2f}", "checkpoint_gib"),
    ]


def _fault(row: Row) -> str | None:
    numbers = (row.load_s, row.start_s, row.kv_tokens, row.host_gib, row.checkpoint_gib)
    return None if positive(*numbers) else "times and sizes must be numbers above zero"
