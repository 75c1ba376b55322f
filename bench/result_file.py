"""A result file: rows that runs have measured, and what each run ran on. JSON, an object of

  env    the environment of the latest run
  runs   by run id, the environment of every run that still has a row
  rows   one object a measured point; its `run` says which run measured it

A run of some points keeps the rows of the others, so a file may hold several runs.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

# What the runs of two rows share where one row can be said to be faster than the other.
COMPARABLE = ("gpu", "driver", "cpu", "cuda", "torch", "triton", "vllm")


class ResultError(ValueError):
    """A result file or a row does not hold what it must."""


class AnyRow(Protocol):
    """A row: a dataclass of JSON types. Rows of one key take each other's place."""

    @property
    def key(self) -> tuple[object, ...]: ...
    @property
    def run(self) -> str: ...


RowType = TypeVar("RowType", bound=AnyRow)


@dataclass(frozen=True, kw_only=True)
class ResultFile(Generic[RowType]):
    """A result file in memory."""

    env: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: tuple[RowType, ...] = ()

    def merge(self, env: dict[str, Any], rows: Iterable[RowType]) -> Self:
        """These results with `rows` of the run `env` in place of rows of the same key."""
        joined = {row.key: row for row in self.rows} | {row.key: row for row in rows}
        runs = {**self.runs, env["run"]: env}
        used = {row.run for row in joined.values()} | {env["run"]}
        return replace(
            self,
            env=env,
            runs={name: run for name, run in runs.items() if name in used},
            rows=tuple(joined.values()),
        )

    def comparable(self, env: dict[str, Any]) -> Self:
        """These results without the rows of runs on another machine or with other versions."""
        rows = (
            row
            for row in self.rows
            if all(self.runs[row.run].get(name) == env.get(name) for name in COMPARABLE)
        )
        return replace(self, rows=tuple(rows))

    def ran_on(self) -> str:
        """In Markdown, a paragraph: the runs, and the versions of each."""
        runs = (
            f"{name}: driver {run['driver']}, torch {run['torch']}, vLLM {run['vllm']}"
            for name, run in self.runs.items()
        )
        return f"Runs: {'; '.join(runs)}."

    def save(self, path: Path) -> None:
        """Write whole or not at all: a run may be killed at any time."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n")
        part.replace(path)


def read(
    path: Path, row_type: Callable[..., RowType], fault: Callable[[RowType], str | None]
) -> ResultFile[RowType]:
    """The results in `path`.

    Args:
        row_type: the dataclass of its rows.
        fault: what is wrong with the values of a row, or None.

    Raises:
        ResultError: not a result file, or a row without what a row must hold; names both.
    """
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ResultError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict) or not {"env", "runs", "rows"} <= content.keys():
        raise ResultError(f"{path}: not an object with env, runs and rows")
    names = {column.name for column in fields(row_type)}  # type: ignore[arg-type]
    rows = []
    for index, entry in enumerate(content["rows"]):
        if entry.keys() != names:
            wrong = ", ".join(sorted(names ^ entry.keys()))
            raise ResultError(f"{path}: row {index} lacks, or should not have: {wrong}")
        row = row_type(**entry)
        if found := fault(row):
            raise ResultError(f"{path}: row {index}: {found}")
        rows.append(row)
    unknown = {row.run for row in rows} - content["runs"].keys()
    if unknown:
        raise ResultError(f"{path}: rows of runs that are not in it: {', '.join(sorted(unknown))}")
    return ResultFile(env=content["env"], runs=content["runs"], rows=tuple(rows))


def sibling(file: Path, benchmark: str) -> Path:
    """BENCHMARK-GPU.json beside ANOTHER-GPU.json: another benchmark's results of the same GPU."""
    return file.with_name(f"{benchmark}-{file.name.partition('-')[2]}")


def positive(*numbers: object) -> bool:
    """Whether all are numbers above zero."""
    return all(isinstance(number, int | float) and number > 0 for number in numbers)
