"""One PNG of a law: runs, fit, band, floor and target over the tokens."""

import math
from pathlib import Path

import numpy as np

from cast_serve.trainer.scaling.predict import Analysis

_POINTS = 120


def write_plot(analysis: Analysis, path: Path) -> None:
    """Loss over tokens, a line and a band for each size; the target where there is one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    tokens = _axis(analysis)
    for size in sorted({run.parameters for run in analysis.runs}):
        mine = [run for run in analysis.runs if run.parameters == size]
        (line,) = axes.plot(tokens, [analysis.law.loss(size, each) for each in tokens])
        color = line.get_color()
        low, high = zip(*(analysis.band(size, each) for each in tokens), strict=True)
        axes.fill_between(tokens, low, high, color=color, alpha=0.15, lw=0)
        axes.plot(
            [run.tokens for run in mine],
            [run.loss for run in mine],
            "o",
            color=color,
            label=f"{size / 1e6:,.3g} M parameters",
        )
        axes.axhline(analysis.law.floor(size), color=color, ls=":", lw=1)
        if dense := next((run.dense_loss for run in mine if run.dense_loss), None):
            axes.axhline(dense, color=color, ls="-.", lw=1, label="its dense model")
    if found := analysis.prediction:
        axes.axhline(found.target.loss, color="black", ls="--", lw=1, label="target")
        if math.isfinite(found.tokens):
            axes.plot(found.tokens, found.target.loss, "k*", ms=12)
    axes.set_xscale("log")
    axes.set(
        xlabel="training tokens",
        ylabel="nats per token",
        title=f"Loss against tokens; band {analysis.confidence:.0%}, dotted: the floor",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _axis(analysis: Analysis) -> list[float]:
    """Tokens from half the shortest run to twice the longest, or past the target's if near."""
    budgets = [run.tokens for run in analysis.runs]
    last = 2.0 * max(budgets)
    if analysis.prediction and math.isfinite(analysis.prediction.tokens):
        # Farther out the runs would shrink to a corner.
        last = max(last, min(2 * analysis.prediction.tokens, 100 * max(budgets)))
    return [float(each) for each in np.geomspace(min(budgets) / 2, last, _POINTS)]
