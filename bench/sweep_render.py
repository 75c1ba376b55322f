"""smollm2-sweep.json to a plot, and the table of docs/cast-in-practice.md.

The file has what short runs of cast-train found on a real model: a row a run, with the flags that
it had besides `common`, and panels, which name the rows that differ in one of them.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cast_serve.bench.markdown import replace_between, table

BEGIN = "<!-- sweep: written by `python -m bench.render` -->"
END = "<!-- end of sweep -->"

# Of a band of panels, from above.
_TEXTS = (("wikitext2_valid_ppl", "WikiText-2"), ("held_out_ppl", "held-out text"))
_ACROSS = 4


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run. Perplexities are of the written 2:4 (or dense) model, at a context of 1024.

    Attributes:
        flags: of cast-train, besides those that all have.
        held_out_ppl: on the share of the training text that was held out.
        wikitext2_valid_ppl: on WikiText-2's validation text, whole, non-overlapping windows.
        travel: of the decay, in mean |masked w|; None for methods without one.
    """

    name: str
    flags: str
    tokens: int
    travel: float | None
    held_out_ppl: float
    wikitext2_valid_ppl: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """Runs that differ in one flag: (its value, the run)."""

    label: str
    points: list[tuple[float, Run]]


@dataclass(frozen=True, kw_only=True)
class Panel:
    axis: str
    log: bool
    lines: list[Line]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    env: dict[str, Any]
    common: str
    runs: list[Run]
    panels: list[Panel]


def load(file: Path) -> Sweep:
    """Read a sweep.

    Raises:
        KeyError: a panel names a run that is not in the file.
    """
    found = json.loads(file.read_text())
    runs = {row["name"]: Run(**row) for row in found["rows"]}
    panels = [
        Panel(
            axis=panel["axis"],
            log=panel.get("log", False),
            lines=[
                Line(
                    label=line["label"],
                    points=sorted(
                        ((value, runs[name]) for value, name in line["points"]),
                        key=lambda point: point[0],
                    ),
                )
                for line in panel["lines"]
            ],
        )
        for panel in found["panels"]
    ]
    return Sweep(env=found["env"], common=found["common"], runs=list(runs.values()), panels=panels)


def render(file: Path) -> list[Path]:
    """Write FILE.png beside FILE.json; returns it."""
    plot = file.with_suffix(".png")
    write_plot(load(file), plot)
    return [plot]


def write_plot(sweep: Sweep, path: Path) -> None:
    """Four panels side by side: above WikiText-2, below the held-out text."""
    # An optional package (the extra `train`), and slow to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(len(sweep.panels), _ACROSS)
    bands = math.ceil(len(sweep.panels) / across)
    figure = Figure(figsize=(3.2 * across, 5.5 * bands), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2 * bands, across, sharey="row", squeeze=False)
    for row, (of, text) in enumerate(_TEXTS * bands):
        grid[row][0].set_ylabel(f"{text}, perplexity")
        for column, axes in enumerate(grid[row]):
            index = row // len(_TEXTS) * across + column
            if index < len(sweep.panels):
                _draw(axes, sweep.panels[index], of)
            else:
                axes.set_axis_off()
    figure.savefig(path, dpi=120)


def _draw(axes: Any, panel: Panel, of: str) -> None:
    for line in panel.lines:
        values = [value for value, _ in line.points]
        axes.plot(values, [getattr(run, of) for _, run in line.points], "o-", ms=4)
    if panel.log:
        axes.set_xscale("log", base=2)
        ticks = sorted({value for line in panel.lines for value, _ in line.points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    else:
        axes.locator_params(axis="x", nbins=5)
    axes.grid(alpha=0.3)
    axes.set_xlabel(panel.axis)
    axes.legend([line.label for line in panel.lines], fontsize=8)


def update_page(page: Path, file: Path) -> None:
    """Put the table of all runs into `page`.

    Raises:
        ValueError: the markers are not there.
    """
    rows = [
        [
            run.name,
            f"`{run.flags}`",
            f"{run.tokens / 1e6:.1f} M",
            "" if run.travel is None else f"{run.travel:.1f}",
            f"{run.held_out_ppl:.2f}",
            f"{run.wikitext2_valid_ppl:.2f}",
        ]
        for run in load(file).runs
    ]
    header = ["run", "flags", "tokens", "travel", "held-out", "WikiText-2"]
    replace_between(page, BEGIN, END, table(header, rows))
