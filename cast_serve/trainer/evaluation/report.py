"""An evaluation's results as tables, for the terminal."""

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

_CUT = "choices whose prompt was longer than the model's positions and lost its start"


def render_evaluation(result: dict[str, Any]) -> RenderableType:
    """Perplexities, then accuracies; what was not asked for is left out."""
    model = f"{result['model']} ({result['form']}, {result['compute']})"
    tables = []
    if result["text"]:
        tables.append(_text(result["text"], model))
    if result["zero_shot"] or result["tasks"]:
        tables.append(_accuracies(result, model))
    return Group(*tables)


def _text(rows: list[dict[str, Any]], model: str) -> Table:
    table = Table(title=escape(f"perplexity of {model}"), title_justify="left")
    table.add_column("text", overflow="fold")
    table.add_column("windows of")
    for header in ("perplexity", "nats a token", "tokens scored"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        context, stride = row["context"], row["strided"]["stride"]
        for kind, score in (
            (f"{context}, apart", row["windows"]),
            (f"{context} every {stride}", row["strided"]),
        ):
            table.add_row(
                escape(f"{row['file']} ({row['join']})"),
                kind,
                _number(score["perplexity"], 3),
                _number(score["loss"], 4),
                f"{score['scored_tokens']:,} of {row['tokens']:,}",
            )
    return table


def _accuracies(result: dict[str, Any], model: str) -> Table:
    table = Table(title=escape(f"zero-shot of {model}"), title_justify="left")
    table.add_column("task", overflow="fold")
    table.add_column("items", justify="right")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("± standard error", justify="right")
    for row in result["zero_shot"]:
        for metric in ("acc", "acc_norm"):
            error = _number(row[f"{metric}_stderr"], 4)
            name = escape(f"{row['file']}, {row['between']!r}")
            table.add_row(name, str(row["items"]), metric, _number(row[metric], 4), error)
        if row["cut"]:
            table.add_row("", str(row["cut"]), _CUT, "", "")
    for task, numbers in result["tasks"].items():
        for metric, value, error in _metrics(numbers):
            table.add_row(escape(f"lm-eval {task}"), "", metric, value, error)
    return table


def _metrics(numbers: dict[str, float | None]) -> Iterator[tuple[str, str, str]]:
    """(metric, value, standard error) of lm-eval's `acc,none` and `acc_stderr,none`."""
    for key, value in numbers.items():
        metric, _, kind = key.partition(",")
        if not metric.endswith("_stderr"):
            error = _number(numbers.get(f"{metric}_stderr,{kind}"), 4)
            shown = metric if kind in ("", "none") else f"{metric} ({kind})"
            yield shown, _number(value, 4), error


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
