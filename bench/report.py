"""What bench_linear prints: the environment, a table a model, and the summary."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from cast_serve.bench.linear_results import Row, totals
from cast_serve.bench.shapes import Model

# Share of the copy bandwidth that decode must reach on the two large layers.
LEAST_COPY_SHARE, DECODE_TOKENS, LARGE_LAYERS = 0.85, 16, ("gate_up", "down")


def print_environment(env: dict[str, Any], console: Console) -> None:
    for name, value in env.items():
        shown = f"{value:.0f}" if isinstance(value, float) and value > 100 else value
        console.print(f"{name:12} {shown}", markup=False)


def print_model(model: Model, rows: Sequence[Row], console: Console) -> None:
    """One line an M: each layer's speed-up, the sum, its floor, and whether it is met."""
    chosen = [row for row in rows if row.selected]
    points = {(row.layer, row.M): row for row in chosen}
    sums = {total.M: total for total in totals(chosen)}
    table = Table(title=f"{model.name}: x dense (sparse us, GB/s or TFLOPS, kernel)")
    for column in ("M", *(f"{x.name} {x.N}x{x.K}" for x in model.layers), "sum", "floor", "roof"):
        table.add_column(column, justify="right", overflow="fold")
    for M in sorted({row.M for row in chosen}):
        cells = [_cell(points.get((layer.name, M))) for layer in model.layers]
        total, floor = sums.get(M), model.floor(M)
        if total is None:
            table.add_row(str(M), *cells)
            continue
        mark = "" if floor is None else " pass" if total.speedup >= floor else " MISS"
        table.add_row(
            str(M),
            *cells,
            f"{total.speedup:.2f}{mark}",
            "" if floor is None else f"{floor:.2f}",
            f"{total.roof_share:.0%}",
        )
    console.print(table)
    for row in rows:
        if not row.selected:
            console.print(
                f"  {row.kernel} {row.config}: {row.layer} M={row.M} {row.sparse_us:.1f} us, "
                f"{row.speedup:.2f}x dense",
                markup=False,
            )


def summarize(env: dict[str, Any], models: Sequence[Model], rows: Sequence[Row]) -> dict[str, Any]:
    """Speed-up of every sum, and every point that falls short, in plain JSON types."""
    large = {model.name for model in models if not model.small}
    speedups: dict[str, dict[int, float]] = {}
    missed = []
    for model in models:
        chosen = [row for row in rows if row.selected and row.model == model.name]
        sums = totals(chosen)
        speedups[model.name] = {total.M: round(total.speedup, 3) for total in sums}
        for total in sums:
            floor = model.floor(total.M)
            if floor is not None and total.speedup < floor:
                missed.append(f"{model.name} M={total.M}: {total.speedup:.2f} < {floor:.2f}")
    return {
        "gpu": env["gpu"],
        "commit": env["commit"],
        "copy_gbps": round(env["copy_gbps"]),
        "speedup": speedups,
        "below_floor": missed,
        "slower_than_dense": [
            f"{row.model} {row.layer} M={row.M}: {row.speedup:.2f}"
            for row in rows
            if row.selected and row.speedup < 1
        ],
        "below_copy_share": [
            f"{row.model} {row.layer} M={row.M}: {row.copy_share:.0%}"
            for row in rows
            if row.selected
            and row.model in large
            and row.layer in LARGE_LAYERS
            and row.M <= DECODE_TOKENS
            and row.copy_share < LEAST_COPY_SHARE
        ],
        "largest_resident": max((row.resident for row in rows if row.selected), default=None),
    }


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    # Rate against the bound that is nearer.
    bytes_bind = row.copy_share >= row.tflops / (2 * row.dense_tflops)
    rate = f"{row.gbps:.0f} GB/s" if bytes_bind else f"{row.tflops:.0f} TF"
    return f"{row.speedup:.2f} ({row.sparse_us:.1f}, {rate}, {row.kernel})"
