"""The plots of a comparison.

perplexity.png   perplexity against tokens
final.png        of the written models, as bars
varied.png       with --vary: what each value of a flag gave, a panel a flag that is a number
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cast_serve.trainer.comparison.results import DENSE, Point, Row, number


def write_plots(rows: Sequence[Row], given: Mapping[str, Any], folder: Path) -> None:
    """Write those that `rows` have something for.

    Args:
        given: what the flags that were varied are in the other runs, by key.
    """
    plot_curves(rows, folder / "perplexity.png")
    plot_final(rows, folder / "final.png")
    numbers = {key: value for key, value in given.items() if isinstance(value, int | float)}
    if numbers:
        plot_varied(rows, numbers, folder / "varied.png")


def plot_curves(rows: Sequence[Row], path: Path) -> None:
    """Perplexity against tokens: solid as pruned then, dashed as it trains where that differs.

    On the left all of it; on the right the sparse methods alone, each in the second half of its
    budget, where those that the prune's loss hides on the left come apart.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The legend is below, in two columns; a letter of it is 0.057 inches wide.
    legend_lines = math.ceil((1 + len(rows)) / 2)
    width = max(12, 2 * (0.7 + 0.057 * max(len(_label(row, rows)) for row in rows)))
    figure = Figure(figsize=(width, 5 + 0.2 * legend_lines), layout="constrained")
    FigureCanvasAgg(figure)
    whole, half = figure.subplots(1, 2)
    for axes in (whole, half):
        _draw_curves(axes, rows)
    whole.set(ylabel="perplexity", yscale="log", title="As pruned at that point (dashed: before)")
    half.set(title="Sparse methods in the second half")
    late = _second_halves([row for row in rows if row.method != "dense"]) or _second_halves(rows)
    if late:
        times, shown = zip(*late, strict=True)
        margin = 0.05 * (max(shown) - min(shown) or max(shown))
        # The shortest budget is not to be a corner of the plot.
        if max(times) > 4 * min(times):
            half.set_xscale("log")
        half.set_xlim(min(times), max(times) * 1.02)
        half.set_ylim(min(shown) - margin, max(shown) + margin)
    handles, labels = whole.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)


def _draw_curves(axes: Any, rows: Sequence[Row]) -> None:
    axes.axhline(rows[0].perplexity_dense, color="grey", lw=1, ls=":", label=DENSE)
    colours = _colours(rows)
    for row in rows:
        label, colour = _label(row, rows), colours[row.method]
        peers = [peer for peer in rows if peer.method == row.method]
        marker = "os^vPX*"[peers.index(row) % 7]
        if not row.curve:
            axes.plot([0], [row.perplexity], "D", color=colour, label=label)
            continue
        tokens = [point.tokens for point in row.curve]
        trained = [point.perplexity for point in row.curve]
        pruned = [_pruned(point) for point in row.curve]
        axes.plot(tokens, pruned, marker=marker, ms=4, color=colour, label=label)
        if any(abs(a / b - 1) > 0.005 for a, b in zip(trained, pruned, strict=True)):
            axes.plot(tokens, trained, ls="--", lw=1, color=colour)
    axes.set(xlabel="training tokens")
    axes.grid(alpha=0.3, which="both")


def _second_halves(rows: Sequence[Row]) -> list[tuple[int, float]]:
    """(tokens, perplexity) of the points there that an axis can hold; a ruined run has others."""
    late = (
        (point.tokens, _pruned(point))
        for row in rows
        for point in row.curve
        if 2 * point.tokens >= row.curve[-1].tokens > 0
    )
    return [(tokens, value) for tokens, value in late if math.isfinite(value)]


def _pruned(point: Point) -> float:
    return point.perplexity if point.pruned is None else point.pruned


def plot_final(rows: Sequence[Row], path: Path) -> None:
    """Bars of the perplexity of the written models; logarithmic where they differ by 10 times."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [_label(row, rows) for row in rows]
    # The bars keep 5 inches beside the longest name.
    width = 5 + 0.08 * max(map(len, names))
    figure = Figure(figsize=(width, 1 + 0.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours, values = _colours(rows), [row.perplexity for row in rows]
    bars = axes.barh(range(len(rows)), values, color=[colours[row.method] for row in rows])
    axes.bar_label(bars, [number(value) for value in values], padding=3, fontsize=8)
    axes.axvline(rows[0].perplexity_dense, color="grey", lw=1, ls=":", label=DENSE)
    if max(values) > 10 * min(values):
        axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="perplexity", title="Perplexity of the written models")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def plot_varied(rows: Sequence[Row], given: Mapping[str, Any], path: Path) -> None:
    """Perplexity of the written models over the values of each flag; a line a method and rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4, 3 * len(given)), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(given), sharey=True, squeeze=False)[0]
    names = {row.checkpoint: _label(row, rows) for row in rows if not row.varied}
    for axes, (key, usual) in zip(panels, given.items(), strict=True):
        for name, points in lines_of(rows, key, usual).items():
            values, found = zip(*points, strict=True)
            axes.plot(values, found, "o-", ms=4, label=names.get(name, name))
            if min(values) > 0 and max(values) > 10 * min(values):
                axes.set_xscale("log")
        axes.set(xlabel=key)
        axes.grid(alpha=0.3, which="both")
    panels[0].set(ylabel="perplexity", yscale="log")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def lines_of(
    rows: Sequence[Row], key: str, usual: float | None
) -> dict[str, list[tuple[float, float]]]:
    """(value, perplexity) in ascending order of the runs that differ in `key` alone, by the usual.

    Args:
        usual: the value of `key` where it is not varied.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        value = row.varied.get(key) if row.varied else usual
        # One-shot methods have no curve, and nothing is varied of them.
        if value is not None and row.curve:
            lines.setdefault(row.usual, []).append((value, row.perplexity))
    return {name: sorted(points) for name, points in lines.items()}


def _label(row: Row, rows: Sequence[Row]) -> str:
    """The method, and what tells its row from others of the same method."""
    peers = [other for other in rows if other.method == row.method]
    parts = [row.method]
    if len({peer.tokens for peer in peers}) > 1:
        parts.append(f"{row.tokens / 1e6:.3g} M tokens")
    if len({peer.lr for peer in peers}) > 1:
        parts.append(f"lr {row.lr:.3g}")
    if len({peer.lambda_ for peer in peers}) > 1:
        parts.append(f"lambda {row.lambda_:.3g}")
    # Of a comparison that was made in pieces, which may have had other flags each.
    varied = {key for peer in peers for key in peer.varied}
    for key in dict.fromkeys(key for peer in peers for key in peer.settings if key not in varied):
        if len({peer.settings.get(key) for peer in peers}) > 1 and key in row.settings:
            parts.append(f"{key} {row.settings[key]}")
    if len({peer.seed for peer in peers}) > 1:
        parts.append(f"seed {row.seed}")
    return ", ".join(filter(None, (*parts, row.otherwise)))


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """One colour a method, so that seeds and rates of a method belong together."""
    return {m: f"C{place}" for place, m in enumerate(dict.fromkeys(row.method for row in rows))}
