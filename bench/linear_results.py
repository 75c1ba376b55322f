"""linear-GPU.json (bench/result_file.py): what a row holds, and what follows from it.

One row a (model, layer, M, dtype) and kernel choice.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cast_serve.bench.result_file import ResultFile, positive, read

# A 4-bit code a group of four weights.
METADATA_BYTES_PER_WEIGHT = 1 / 8

Key = tuple[str, str, int, str, str]


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
class Results(ResultFile[Row]):
    """A linear-GPU.json in memory."""

    def selected(self, model: str, dtype: str) -> list[Row]:
        """The rows of the op's own choice."""
        return [
            row for row in self.rows if row.selected and (row.model, row.dtype) == (model, dtype)
        ]


def load(path: Path) -> Results:
    """The results in `path`.

    Raises:
        ResultError: not a result file, or a row without what a row must hold; names both.
    """
    found = read(path, Row, _fault)
    return Results(env=found.env, runs=found.runs, rows=found.rows)


def load_or_empty(path: Path) -> Results:
    return load(path) if path.exists() else Results()


def _fault(row: Row) -> str | None:
    numbers = (row.dense_us, row.sparse_us, row.gbps, row.copy_gbps, row.dense_tflops)
    return None if positive(*numbers) else "times and rates must be numbers above zero"


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
