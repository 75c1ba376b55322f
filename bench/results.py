"""Result files: what a row holds, what follows from it, and how runs join in one file.

`bench/results/linear-GPU.json` is an object:

  env    the environment of the latest run
  runs   by run id, the environment of every run that still has a row
  rows   one object a (model, layer, M, dtype) and kernel choice; `run` says which run measured it

A run of some models keeps the rows of the others, so a file may hold several runs.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

# A 4-bit code a group of four weights.
METADATA_BYTES_PER_WEIGHT = 1 / 8

Key = tuple[str, str, int, str, str]


class ResultError(ValueError):
    """A result file or a row does not hold what it must."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layer at one M: dense and sparse time in one run, and what they are compared with.

    Attributes:
        kernel, config: what ran.
        selected: the op's own choice; False for a row of a forced kernel, kept beside it.
        dense_us, sparse_us: medians a call; *_iqr_us their interquartile ranges.
        gbps: bytes the sparse layer must move (values, metadata, x, y) / sparse_us.
        copy_gbps: a large device-to-device copy in the same run, bytes read and written.
        dense_tflops: cuBLAS on 8192 x 8192 x 8192 in the same run.
        host_us: host time of one eager call of the op; None if not taken.
        resident: bytes that the layer keeps (values, its plan's metadata) / those of the dense
            weight.
        workspace_bytes: that a call takes and gives back, so all layers together take them once.
        run: key of `runs`.
    """

    model: str
    layer: str
    N: int
    K: int
    M: int
    dtype: str
    kernel: str
    config: str
    selected: bool
    dense_us: float
    dense_iqr_us: float
    sparse_us: float
    sparse_iqr_us: float
    gbps: float
    copy_gbps: float
    dense_tflops: float
    host_us: float | None
    resident: float
    workspace_bytes: int
    run: str

    @property
    def key(self) -> Key:
        choice = "" if self.selected else self.kernel
        return (self.model, self.layer, self.M, self.dtype, choice)

    @property
    def speedup(self) -> float:
        return self.dense_us / self.sparse_us

    @property
    def tflops(self) -> float:
        """Dense-equivalent: what the same product takes without zeros."""
        return 2 * self.M * self.N * self.K / self.sparse_us / 1e6

    @property
    def copy_share(self) -> float:
        return self.gbps / self.copy_gbps

    @property
    def roof_us(self) -> float:
        return roof_us(
            N=self.N,
            K=self.K,
            M=self.M,
            copy_gbps=self.copy_gbps,
            dense_tflops=self.dense_tflops,
        )

    @property
    def roof_share(self) -> float:
        return self.roof_us / self.sparse_us


@dataclass(frozen=True, kw_only=True)
class Results:
    """A result file in memory."""

    env: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()

    def merge(self, env: dict[str, Any], rows: Iterable[Row]) -> "Results":
        """These results with `rows` of the run `env` in place of rows of the same key."""
        joined = {row.key: row for row in self.rows} | {row.key: row for row in rows}
        runs = {**self.runs, env["run"]: env}
        used = {row.run for row in joined.values()} | {env["run"]}
        return Results(
            env=env,
            runs={name: run for name, run in runs.items() if name in used},
            rows=tuple(joined.values()),
        )

    def selected(self, model: str, dtype: str) -> list[Row]:
        """The rows of the op's own choice."""
        return [
            row for row in self.rows if row.selected and (row.model, row.dtype) == (model, dtype)
        ]

    def save(self, path: Path) -> None:
        """Write whole or not at all: a run may be killed at any time."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"env": self.env, "runs": self.runs, "rows": [asdict(row) for row in self.rows]}
        part = path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(path)


def load(path: Path) -> Results:
    """The results in `path`.

    Raises:
        ResultError: not a result file, or a row without what a row must hold; names both.
    """
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ResultError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict) or not {"env", "runs", "rows"} <= content.keys():
        raise ResultError(f"{path}: not an object with env, runs and rows")
    rows = tuple(_row(path, index, entry) for index, entry in enumerate(content["rows"]))
    unknown = {row.run for row in rows} - content["runs"].keys()
    if unknown:
        raise ResultError(f"{path}: rows of runs that are not in it: {', '.join(sorted(unknown))}")
    return Results(env=content["env"], runs=content["runs"], rows=rows)


def load_or_empty(path: Path) -> Results:
    return load(path) if path.exists() else Results()


def _row(path: Path, index: int, entry: dict[str, Any]) -> Row:
    names = {column.name for column in fields(Row)}
    if entry.keys() != names:
        wrong = ", ".join(sorted(names ^ entry.keys()))
        raise ResultError(f"{path}: row {index} lacks, or should not have: {wrong}")
    row = Row(**entry)
    numbers = (row.dense_us, row.sparse_us, row.gbps, row.copy_gbps, row.dense_tflops)
    if not all(isinstance(number, int | float) and number > 0 for number in numbers):
        raise ResultError(f"{path}: row {index}: times and rates must be numbers above zero")
    return row


def sparse_bytes(*, N: int, K: int, M: int, itemsize: int = 2) -> float:
    """Bytes a 2:4 layer must move for M tokens: values, one metadata, x and y, each once."""
    return N * K * (itemsize / 2 + METADATA_BYTES_PER_WEIGHT) + itemsize * M * (N + K)


def roof_us(*, N: int, K: int, M: int, copy_gbps: float, dense_tflops: float) -> float:
    """Least time: all bytes at the speed of a copy, or the product at twice cuBLAS's peak."""
    moved = sparse_bytes(N=N, K=K, M=M) / copy_gbps / 1e3
    computed = 2 * M * N * K / (2 * dense_tflops) / 1e6
    return max(moved, computed)


@dataclass(frozen=True, kw_only=True)
class Total:
    """The layers of a model at one M, taken together."""

    M: int
    dense_us: float
    sparse_us: float
    roof_us: float
    least_speedup: float

    @property
    def speedup(self) -> float:
        return self.dense_us / self.sparse_us

    @property
    def roof_share(self) -> float:
        return self.roof_us / self.sparse_us


def totals(rows: Iterable[Row], *, layers: int = 4) -> list[Total]:
    """One total a value of M at which all `layers` of the model were measured, M ascending."""
    by_tokens: dict[int, list[Row]] = {}
    for row in rows:
        by_tokens.setdefault(row.M, []).append(row)
    return [
        Total(
            M=tokens,
            dense_us=sum(row.dense_us for row in group),
            sparse_us=sum(row.sparse_us for row in group),
            roof_us=sum(row.roof_us for row in group),
            least_speedup=min(row.speedup for row in group),
        )
        for tokens, group in sorted(by_tokens.items())
        if len(group) == layers
    ]
