"""How a point is timed: CUDA graphs, weights that are not in L2, variants in turn, median and IQR.

A variant is a list of calls, one a weight copy, that one graph holds. The copies together exceed
L2 several times over, so a call finds nothing of its weight in it, as in a model whose layers
follow each other.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cast_serve.kernels.measure import Call, graph_time_us, interleaved_time_us, stream_time_us

FEWEST_REPEATS = 5
MOST_REPEATS = 40

# Shorter graphs are as coarse as the events around them.
LEAST_GRAPH_US = 300.0

# No kernel in a graph is over sooner, however little it does.
LEAST_KERNEL_US = 2.0


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median and interquartile range over the replays."""

    us: float
    iqr_us: float

    @classmethod
    def of(cls, samples_us: Sequence[float]) -> "Timing":
        if len(samples_us) == 1:
            return cls(samples_us[0], 0.0)
        lower, median, upper = statistics.quantiles(samples_us, n=4, method="inclusive")
        return cls(median, upper - lower)


def limit_copies(wanted: int, *, copy_bytes: int, most_bytes: int) -> int:
    """`wanted` copies, or as many as fit in `most_bytes`.

    Raises:
        ValueError: not even two fit, and with one there is nothing to rotate over.
    """
    fit = most_bytes // copy_bytes
    if fit < 2:
        raise ValueError(
            f"two weight copies of {copy_bytes / 2**20:.0f} MiB do not fit in "
            f"{max(0, most_bytes) / 2**20:.0f} MiB of GPU memory; free some, or leave the model out"
        )
    return min(wanted, fit)


def count_repeats(turn_us: float, *, budget_ms: float) -> int:
    """How often all variants take their turn, at `turn_us` for all of them once."""
    return min(MOST_REPEATS, max(FEWEST_REPEATS, int(budget_ms * 1e3 / turn_us)))


def fill_graph(calls: Sequence[Call], *, call_us: float) -> list[Call]:
    """`calls` in whole rounds, until a graph of them takes `LEAST_GRAPH_US`."""
    round_us = max(call_us, LEAST_KERNEL_US) * len(calls)
    return [*calls] * math.ceil(LEAST_GRAPH_US / round_us)


def time_variants(
    variants: Mapping[str, Sequence[Call]], *, least_us: float, budget_ms: float
) -> dict[str, Timing]:
    """Time the variants in turn, about `budget_ms` of GPU time together.

    Args:
        variants: by name, calls that have been prepared and differ in the weight copy only.
        least_us: what a call takes at least, for the length of the graphs.
        budget_ms: for replays; `FEWEST_REPEATS` are taken in any case.
    """
    filled = {name: fill_graph(calls, call_us=least_us) for name, calls in variants.items()}
    turn_us = 0.0
    for name, calls in variants.items():
        calls[0]()
        turn_us += stream_time_us(calls[0]) * len(filled[name])
    repeats = count_repeats(turn_us, budget_ms=budget_ms)
    samples = interleaved_time_us(list(filled.values()), repeats=repeats)
    return {name: Timing.of(taken) for name, taken in zip(filled, samples, strict=True)}


def copy_gbps(device: torch.device) -> float:
    """GB/s of a device-to-device copy, counting bytes read and bytes written."""
    # 2 GiB: large against L2, and long (1 ms at 4.3 TB/s) against a launch.
    source = torch.randint(-128, 128, (2 << 30,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    # Not in a graph: a copy there goes through the copy engine, at 60 % of what kernels reach.
    us = statistics.median(stream_time_us(lambda: target.copy_(source)) for _ in range(20))
    return 2 * source.numel() / us / 1e3


def dense_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of cuBLAS on 8192 x 8192 x 8192 random data."""
    side = 8192
    left = torch.randn(side, side, dtype=dtype, device=device)
    right = torch.randn(side, side, dtype=dtype, device=device)
    out = torch.empty_like(left)
    us = statistics.median(graph_time_us([lambda: torch.mm(left, right.t(), out=out)], repeats=20))
    return 2 * side**3 / us / 1e6
