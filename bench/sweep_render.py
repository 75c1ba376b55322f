"""NAME-sweep.json to a plot, and a table of docs/cast-in-practice.md.

The file has what short runs of cast-train found on a real model: a row a run, with the flags that
it had besides `common` and a perplexity on each of `texts`, and panels, which name rows by
the value of what is looked at.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cast_serve.bench.markdown import replace_between, table

_ACROSS = 4
# Lines whose labels find room within a panel.
_WITHIN = 4


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Attributes:
        flags: of cast-train, besides those that all have.
        travel: of the decay, in mean |masked w|; None for methods without one.
        perplexities: of the written 2:4 (or dense) model at a context of 1024, by text: on
            WikiText-2's validation text whole, in non-overlapping windows, on others as cast-train
            evaluates.
        commit: that it was run at, where another one than `Sweep.env` has.
    """

    name: str
    flags: str
    tokens: int
    travel: float | None
    perplexities: dict[str, float]
    commit: str | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """Runs by the value of a flag: (value, run)."""

    label: str
    points: list[tuple[float, Run]]


@dataclass(frozen=True, kw_only=True)
class Panel:
    axis: str
    log: bool
    lines: list[Line]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """`texts`: the name that a reader sees of each text of `Run.perplexities`, in order."""

    env: dict[str, Any]
    common: str
    texts: dict[str, str]
    runs: list[Run]
    panels: list[Panel]


def load(file: Path) -> Sweep:
    """Read a sweep.

    Raises:
        KeyError: a panel names a run that is not in the file, or a run has not all texts.
    """
    found = json.loads(file.read_text())
    texts = found["texts"]
    runs = {}
    for row in found["rows"]:
        perplexities = {text: row.pop(text) for text in texts}
        runs[row["name"]] = Run(**row, perplexities=perplexities)
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
    return Sweep(
        env=found["env"],
        common=found["common"],
        texts=texts,
        runs=list(runs.values()),
        panels=panels,
    )


def render(file: Path) -> list[Path]:
    """Write FILE.png beside FILE.json; returns it."""
    plot = file.with_suffix(".png")
    write_plot(load(file), plot)
    return [plot]


def write_plot(sweep: Sweep, path: Path) -> None:
    """At most four panels side by side, each once for every text, one above the other."""
    # An optional package (the extra `train`), and slow to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(len(sweep.panels), _ACROSS)
    texts = list(sweep.texts.items())
    bands = math.ceil(len(sweep.panels) / across)
    size = (max(3.2 * across, 8), 2.75 * len(texts) * bands)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(texts) * bands, across, sharey="row", squeeze=False)
    for row, (of, text) in enumerate(texts * bands):
        grid[row][0].set_ylabel(f"{text}, perplexity")
        for column, axes in enumerate(grid[row]):
            index = row // len(texts) * across + column
            if index < len(sweep.panels):
                _draw(axes, sweep.panels[index], of)
            else:
                axes.set_axis_off()
    figure.savefig(path, dpi=120)


def _draw(axes: Any, panel: Panel, of: str) -> None:
    for line in panel.lines:
        values = [value for value, _ in line.points]
        axes.plot(values, [run.perplexities[of] for _, run in line.points], "o-", ms=4)
    if panel.log:
        axes.set_xscale("log", base=2)
        ticks = sorted({value for line in panel.lines for value, _ in line.points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    else:
        axes.locator_params(axis="x", nbins=5)
    axes.grid(alpha=0.3)
    axes.set_xlabel(panel.axis)
    # Of many lines beside the panel, where it hides no point.
    beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    place = beside if len(panel.lines) > _WITHIN else {}
    axes.legend([line.label for line in panel.lines], fontsize=8, **place)


def markers(file: Path) -> tuple[str, str]:
    """The lines of the page between which the table of `file` stands."""
    return f"<!-- {file.stem}: written by `python -m bench.render` -->", f"<!-- end {file.stem} -->"


def update_page(page: Path, file: Path) -> None:
    """Put the table of all runs into `page`; travel only where a run has one.

    Raises:
        ValueError: the markers are not there.
    """
    sweep = load(file)
    travelled = any(run.travel is not None for run in sweep.runs)
    rows = [
        [
            run.name,
            f"`{run.flags}`" if run.flags else "",
            f"{run.tokens / 1e6:.1f} M",
            *([("" if run.travel is None else f"{run.travel:.1f}")] if travelled else []),
            *(f"{run.perplexities[text]:.2f}" for text in sweep.texts),
        ]
        for run in sweep.runs
    ]
    header = ["run", "flags", "tokens", *(["travel"] if travelled else []), *sweep.texts.values()]
    replace_between(page, *markers(file), table(header, rows))
