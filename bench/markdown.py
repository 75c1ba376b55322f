"""Tables in Markdown, and where they go: between two marker lines of a README."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar


class ServedRow(Protocol):
    """A row of what was measured of a model that vLLM serves with some flags."""

    @property
    def model(self) -> str: ...
    @property
    def flags(self) -> str: ...


RowType = TypeVar("RowType", bound=ServedRow)


def table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    """The lines of a table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def with_spread(value: float, spread: float, *, times: int, digits: int) -> str:
    """A median of `times` measurements ± largest less least; of one alone the value."""
    shown = f"{value:.{digits}f}"
    return shown if times == 1 else f"{shown} ± {spread:.{digits}f}"


def table_by_model(
    header: Iterable[str],
    rows: Sequence[RowType],
    cells: Callable[[RowType, Sequence[RowType]], list[str]],
) -> list[str]:
    """A table for each model and flags, each below a line that names them; an empty line last.

    Args:
        cells: of a row among those of its table.
    """
    lines: list[str] = []
    for model, flags in dict.fromkeys((row.model, row.flags) for row in rows):
        own = [row for row in rows if (row.model, row.flags) == (model, flags)]
        lines += [f"{model}{f', `{flags}`' if flags else ''}:", ""]
        lines += [*table(list(header), [cells(row, own) for row in own]), ""]
    return lines


def replace_between(file: Path, begin: str, end: str, lines: list[str]) -> None:
    """Put `lines` between the lines `begin` and `end` of `file`.

    Raises:
        ValueError: the markers are not there.
    """
    before, found_begin, rest = file.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{file} lacks the lines {begin!r} and {end!r}")
    text = "\n".join(lines)
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}")
