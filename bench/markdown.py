"""Tables in Markdown, and where they go: between two marker lines of a README."""

from collections.abc import Iterable
from pathlib import Path


def table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    """The lines of a table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


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
