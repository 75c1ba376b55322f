"""What bench_serve prints: one table with ratios, the floors, and the summary."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from cast_serve.bench.markdown import with_spread
from cast_serve.bench.serving.engines import BASELINE
from cast_serve.bench.serving.floors import WEIGHTS, floor_of, judge
from cast_serve.bench.serving.results import Ratios, Row, baseline_of

HEADER = (
    "workload",
    "engine",
    "TTFT ms",
    "p99",
    "TPOT ms",
    "p99",
    "output tokens/s",
    "weights GiB",
    "KV tokens",
)


def print_rows(rows: Sequence[Row], gpu: str, console: Console) -> None:
    """A line a workload and engine; in brackets how much better than dense bf16."""
    model = ", ".join(dict.fromkeys(row.model for row in rows))
    table = Table(title=f"{model} on {gpu}: median ± spread of repeats (x dense-bf16)")
    for index, column in enumerate(HEADER):
        table.add_column(column, justify="left" if index < 2 else "right")
    workloads = list(dict.fromkeys(row.workload for row in rows))
    for workload in workloads:
        for row in rows:
            if row.workload == workload:
                table.add_row(*cells(row, rows, gpu))
        table.add_section()
    console.print(table)
    for judged in judge(rows, gpu):
        verdict = "pass" if judged.met else "MISS"
        console.print(f"{verdict}  {judged}")


def cells(row: Row, rows: Sequence[Row], gpu: str) -> list[str]:
    """The cells under `HEADER`."""
    ratios = Ratios.of(row, baseline_of(row, rows))

    def against(metric: str) -> str:
        ratio = getattr(ratios, metric)
        if ratio is None or row.engine == BASELINE:
            return ""
        floor = floor_of(row, metric, gpu)
        return f" ({ratio:.2f}{' ✗' if floor is not None and ratio < floor.ratio else ''})"

    def shown(value: float, spread: float, digits: int, metric: str) -> str:
        return with_spread(value, spread, times=row.repeats, digits=digits) + against(metric)

    tpot = "-"
    if row.tpot_ms is not None and row.tpot_spread_ms is not None:
        tpot = shown(row.tpot_ms, row.tpot_spread_ms, 2, "tpot")
    rate, spread = row.output_tokens_per_s, row.output_tokens_per_s_spread
    return [
        row.workload,
        row.engine,
        shown(row.ttft_ms, row.ttft_spread_ms, 1, "ttft"),
        f"{row.ttft_p99_ms:.1f}",
        tpot,
        "-" if row.tpot_p99_ms is None else f"{row.tpot_p99_ms:.2f}",
        shown(rate, spread, 0, "output_tokens_per_s"),
        "-" if row.weights_gib is None else f"{row.weights_gib:.2f}" + against(WEIGHTS),
        f"{row.kv_tokens:,}",
    ]


def summarize(env: dict[str, Any], rows: Sequence[Row], left_out: dict[str, str]) -> dict[str, Any]:
    """Ratios of every row, the floors missed, and what was not measured; plain JSON types.

    Args:
        left_out: by engine, or engine and workload, why.
    """
    speedups: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row.engine == BASELINE:
            continue
        ratios = Ratios.of(row, baseline_of(row, rows))
        measured = {name: round(ratio, 3) for name, ratio in vars(ratios).items() if ratio}
        speedups.setdefault(row.engine, {})[row.workload] = measured
    return {
        "gpu": env["gpu"],
        "vllm": env["vllm"],
        "commit": env["commit"],
        "speedup": speedups,
        "below_floor": [str(judged) for judged in judge(rows, env["gpu"]) if not judged.met],
        "left_out": left_out,
    }
