"""serve-GPU.json (bench/result_file.py): a row an engine, model and workload."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cast_serve.bench.result_file import ResultFile, positive, read
from cast_serve.bench.serving.client import Measurement
from cast_serve.bench.serving.engines import BASELINE
from cast_serve.bench.serving.server import Startup
from cast_serve.bench.serving.workloads import Workload


@dataclass(frozen=True, kw_only=True)
class Row:
    """A workload on an engine: medians over the repeats, each of which is a median over requests.

    Attributes:
        input_len, output_len: tokens a request; None: drawn as ShareGPT's are.
        ttft_ms, ttft_p99_ms: time to the first token, median and 99th percentile of requests.
        ttft_mean_ms, ttft_engine_ms: its mean, and the mean of what of it passes in the engine
            (client.py); None in rows from before they were measured.
        tpot_ms, tpot_p99_ms: time per output token after the first; None with one token out.
        ttft_spread_ms, tpot_spread_ms, output_tokens_per_s_spread: largest less least of the
            repeats.
        weights_gib, load_s: of one rank, and how long it loaded; None where vLLM does not log
            them (CPU).
        kv_tokens: that the KV cache holds.
        start_s: from the server's start until it answered.
        flags: given to every server beside those that bench_serve gives itself.
        run: key of `runs`.
    """

    engine: str
    model: str
    workload: str
    concurrency: int
    input_len: int | None
    output_len: int | None
    num_prompts: int
    repeats: int
    ttft_ms: float
    ttft_p99_ms: float
    ttft_spread_ms: float
    ttft_mean_ms: float | None
    ttft_engine_ms: float | None
    tpot_ms: float | None
    tpot_p99_ms: float | None
    tpot_spread_ms: float | None
    output_tokens_per_s: float
    output_tokens_per_s_spread: float
    weights_gib: float | None
    kv_tokens: int
    load_s: float | None
    start_s: float
    flags: str
    run: str

    @classmethod
    def of(
        cls,
        *,
        engine: str,
        model: str,
        workload: Workload,
        measured: Sequence[Measurement],
        startup: Startup,
        start_s: float,
        flags: Sequence[str],
        run: str,
    ) -> "Row":
        """The row of one or more repeats."""
        ttft = [one.ttft_ms for one in measured]
        in_engine = [one.ttft_engine_ms for one in measured if one.ttft_engine_ms is not None]
        tpot = [one.tpot_ms for one in measured if one.tpot_ms is not None]
        tpot_p99 = [one.tpot_p99_ms for one in measured if one.tpot_p99_ms is not None]
        tokens = [one.output_tokens_per_s for one in measured]
        return cls(
            engine=engine,
            model=model,
            workload=workload.name,
            concurrency=workload.concurrency,
            input_len=workload.input_len,
            output_len=workload.output_len,
            num_prompts=workload.num_prompts,
            repeats=len(measured),
            ttft_ms=statistics.median(ttft),
            ttft_p99_ms=statistics.median(one.ttft_p99_ms for one in measured),
            ttft_spread_ms=max(ttft) - min(ttft),
            ttft_mean_ms=statistics.median(one.ttft_mean_ms for one in measured),
            ttft_engine_ms=statistics.median(in_engine) if in_engine else None,
            tpot_ms=statistics.median(tpot) if tpot else None,
            tpot_p99_ms=statistics.median(tpot_p99) if tpot_p99 else None,
            tpot_spread_ms=max(tpot) - min(tpot) if tpot else None,
            output_tokens_per_s=statistics.median(tokens),
            output_tokens_per_s_spread=max(tokens) - min(tokens),
            weights_gib=startup.weights_gib,
            kv_tokens=startup.kv_tokens,
            load_s=startup.load_s,
            start_s=start_s,
            flags=" ".join(flags),
            run=run,
        )

    @property
    def key(self) -> tuple[str, str, str, str]:
        return (self.engine, self.model, self.workload, self.flags)

    @property
    def requests(self) -> tuple[int, int | None, int | None, int]:
        """What the workload was made of, which may be another one under the same name."""
        return (self.concurrency, self.input_len, self.output_len, self.num_prompts)


Results = ResultFile[Row]


@dataclass(frozen=True)
class Ratios:
    """How much better than the baseline a row is: above 1 is faster, and smaller of weights.

    None: not measured.
    """

    ttft: float | None
    tpot: float | None
    output_tokens_per_s: float | None
    weights_gib: float | None

    @classmethod
    def of(cls, row: Row, baseline: Row | None) -> "Ratios":
        if baseline is None:
            return cls(None, None, None, None)
        weighed = row.weights_gib and baseline.weights_gib
        decodes = row.tpot_ms and baseline.tpot_ms
        return cls(
            ttft=baseline.ttft_ms / row.ttft_ms,
            tpot=baseline.tpot_ms / row.tpot_ms if decodes else None,  # type: ignore[operator]
            output_tokens_per_s=row.output_tokens_per_s / baseline.output_tokens_per_s,
            weights_gib=baseline.weights_gib / row.weights_gib if weighed else None,  # type: ignore[operator]
        )


def baseline_of(row: Row, rows: Iterable[Row]) -> Row | None:
    """The baseline's row of the same model, flags and workload, of the same requests."""
    for other in rows:
        if other.key == (BASELINE, *row.key[1:]) and other.requests == row.requests:
            return other
    return None


def load(path: Path) -> Results:
    """The results in `path`.

    Raises:
        ResultError: not a result file, or a row without what a row must hold; names both.
    """
    return read(path, Row, _fault)


def load_or_empty(path: Path) -> Results:
    return load(path) if path.exists() else Results()


def _fault(row: Row) -> str | None:
    numbers = [row.ttft_ms, row.output_tokens_per_s, row.kv_tokens, row.concurrency]
    numbers += [] if row.tpot_ms is None else [row.tpot_ms]
    return None if positive(*numbers) else "times, rates and sizes must be numbers above zero"
