"""How long calls take on the GPU, as they take it while serving: in CUDA graphs, weights not in L2.

A variant is a list of calls that differ only in the copy of the weight they read. One graph holds
all of them, so no host time is measured, and each call finds its copy pushed out of L2 by the
others.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], object]

# A graph of fewer calls would be as short as the events around it are coarse.
MIN_CALLS = 16

# Weights in rotation, as a multiple of L2: at 1x an LRU cache would keep part of them.
ROTATION = 4

# Replays before the first one that counts: clocks rise, instruction caches fill.
WARM_UP = 2


def copies_past_l2(weight_bytes: int, device: torch.device) -> int:
    """How many copies of a weight to rotate over so that none is left in L2: at least two."""
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, math.ceil(ROTATION * l2_bytes / weight_bytes))


def rotation(calls: Sequence[Call]) -> list[Call]:
    """`calls` over and over, in whole rounds, until there are MIN_CALLS."""
    return [*calls] * math.ceil(MIN_CALLS / len(calls))


def graph_time_us(calls: Sequence[Call], *, repeats: int) -> list[float]:
    """us per call in each of `repeats` replays of one CUDA graph of all `calls`, in order.

    Each call has run once before: what compiles, does so then. Synchronises.
    """
    return interleaved_time_us([calls], repeats=repeats)[0]


def interleaved_time_us(variants: Sequence[Sequence[Call]], *, repeats: int) -> list[list[float]]:
    """For each variant us per call in each of `repeats` replays.

    The variants take turns, so that a change of the GPU's clock meets all of them.
    """
    # One pool and stream: outputs are not looked at, and one set of them may be gigabytes. torch's
    # own stream for captures is of the device that the process captured on first.
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    graphs = [_captured(calls, pool, stream) for calls in variants]
    samples: list[list[float]] = [[] for _ in variants]
    for turn in range(WARM_UP + repeats):
        for calls, graph, taken in zip(variants, graphs, samples, strict=True):
            us = stream_time_us(graph.replay) / len(calls)
            if turn >= WARM_UP:
                taken.append(us)
    return samples


def stream_time_us(call: Call) -> float:
    """us of one call that has run before, host time included. Synchronises."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


def _captured(calls: Sequence[Call], pool: Any, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # thread_local: another thread of a server may allocate meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        for call in calls:
            call()
    return graph
