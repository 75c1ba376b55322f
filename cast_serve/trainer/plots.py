"""PNG plots of a finished run, from its entries in log.jsonl."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One plot: log keys and their legends over the steps."""

    name: str
    title: str
    label: str
    series: dict[str, str]
    log: bool = False


FIGURES = (
    Figure(
        name="loss",
        title="Training loss and its parts",
        label="nats per token",
        series={"loss": "total", "ce": "cross-entropy", "kl": "KL to the teacher"},
    ),
    Figure(
        name="perplexity",
        title="Perplexity on the evaluation text",
        label="perplexity",
        series={"eval_perplexity": "as it trains", "eval_perplexity_pruned": "pruned then"},
        log=True,
    ),
    Figure(
        name="sparse_weight_ratio",
        title="Sparse weight ratio: weight that the prune will keep",
        label="||W * M||_1 / ||W||_1",
        series={"sparse_weight_ratio": "sparsified layers"},
    ),
    Figure(
        name="mask_flips",
        title="Mask entries changed by a refresh",
        label="share of the sparsified weights",
        series={"mask_flips": "last refresh"},
    ),
    Figure(
        name="magnitudes",
        title="Magnitude of masked against kept weights",
        label="mean |w|",
        series={"masked_magnitude": "masked", "kept_magnitude": "kept"},
        log=True,
    ),
)


def write_plots(history: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write every figure that has data to folder/NAME.png; returns the files."""
    # An optional package (the extra `train`), and slow to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for figure in FIGURES:
        series = {key: _points(history, key) for key in figure.series}
        if not any(series.values()):
            continue
        canvas = Canvas(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.subplots()
        for key, points in series.items():
            # A marker shows a series of a single entry, and how often a run was logged.
            marker = "o" if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), label=figure.series[key], marker=marker, ms=3)
        if figure.log:
            axes.set_yscale("log")
        axes.set(xlabel="optimizer step", ylabel=figure.label, title=figure.title)
        axes.grid(alpha=0.3)
        axes.legend()
        path = folder / f"{figure.name}.png"
        canvas.savefig(path, dpi=150)
        written.append(path)
    return written


def _points(history: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in history if key in entry]
