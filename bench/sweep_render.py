"""smollm2-sweep.json to a plot, and the table of docs/cast-in-practice.md.

The file has what short runs of cast-train found on a real model: a row a run, with the flags that
it had besides `common`, and panels, which name the rows that differ in one of them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cast_serve.bench.markdown import replace_between, table

BEGIN = "<!-- sweep: written by `python -m bench.render` -->"
END = "<!-- end of sweep -->"


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
    """Above WikiText-2, below the held-out text; a column a panel."""
    # An optional package (the extra `train`), and slow to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(sweep.panels), 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, len(sweep.panels), sharey="row", squeeze=False)
    for panel, texts in zip(sweep.panels, zip(above, below, strict=True), strict=True):
        for axes, of in zip(texts, ("wikitext2_valid_ppl", "held_out_ppl"), strict=True):
            for line in panel.lines:
                values = [value for value, _ in line.points]
                axes.plot(values, [getattr(run, of) for _, run in line.points], "o-", ms=4)
            if panel.log:
                axes.set_xscale("log", base=2)
                ticks = sorted({value for line in panel.lines for value, _ in line.points})
                axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
            axes.grid(alpha=0.3)
        texts[1].set_xlabel(panel.axis)
        texts[0].legend([line.label for line in panel.lines], fontsize=8)
    above[0].set_ylabel("WikiText-2, perplexity")
    below[0].set_ylabel("held-out text, perplexity")
    figure.savefig(path, dpi=120)


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
