"""Tuning: which kernel and config is fastest for a layer on this GPU, by timing them.

At each M of BUCKETS every kernel's first guess is compiled and timed once, roughly; further guesses
follow while the bucket has time left; those that are in the race are then timed in turns, in CUDA
graphs over rotated weights. A plan keeps at most `MAX_RESIDENT` of the dense weight's bytes.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from cast_serve.kernels.measure import (
    Call,
    copies_past_l2,
    interleaved_time_us,
    rotation,
    stream_time_us,
)
from cast_serve.kernels.plan import BUCKETS, Plan
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.registry import KERNELS
from cast_serve.kernels.spec import KernelSpec
from cast_serve.kernels.weight import SparseWeight, build

# Seconds a shape that go into compiling and timing guesses beyond each kernel's first; shared out
# evenly over the buckets. A Llama has four shapes, so it loads up to a minute slower, once.
BUDGET_S = 12.0

# Of the dense weight's bytes, what a layer may keep: the values are 0.5 and each metadata layout is
# 0.0625, more where its tiles are padded, so there is room for two.
MAX_RESIDENT = 0.63
MAX_LAYOUTS = 2

# A second layout has to make the layer this much faster, in the geometric mean over BUCKETS.
SECOND_LAYOUT_GAIN = 0.02

# A first guess this much slower than the fastest one is out of the race: kernels for decode take
# tens of milliseconds at M = 8192.
HOPELESS = 3.0

# What launching a call may take on a slow host: below that a rough time says nothing of the GPU.
HOST_US = 100.0

REPEATS = 7
MAX_COPIES = 128

# Values of the kept columns and of x are random: power, and with it the clock, depends on them.
_ANY_TWO = torch.tensor([0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100], dtype=torch.uint8)

Candidate = tuple[str, str]  # kernel, config
Timings = dict[int, dict[Candidate, float]]  # M -> candidate -> us


class TuningError(RuntimeError):
    """Nothing can be timed or compiled here and now."""


def tune(problem: Problem, device: torch.device) -> Plan:
    """The fastest plan for `problem` on `device`, measured now: seconds, and synchronises.

    Raises:
        TuningError: there is no memory to measure in.
    """
    specs = {name: spec for name, spec in KERNELS.items() if spec.supports(problem) is None}
    try:
        with torch.cuda.device(device), torch.inference_mode():
            timings, shares = _measure_on(problem, specs, device)
    except torch.cuda.OutOfMemoryError as error:
        raise TuningError(
            f"no GPU memory to time kernels for {problem}; free some, or name one with "
            f"CAST_SERVE_KERNEL ({', '.join(specs)})"
        ) from error
    # What the timing leaves in torch's cache would be missing from the KV cache.
    torch.cuda.empty_cache()
    return choose(timings, {name: spec.metadata for name, spec in specs.items()}, shares)


def _measure_on(
    problem: Problem, specs: Mapping[str, KernelSpec], device: torch.device
) -> tuple[Timings, dict[str, float]]:
    """Timings, and the metadata bytes of each layout as part of the dense weight's."""
    layouts = tuple(dict.fromkeys(spec.metadata for spec in specs.values()))
    weights = _weights(problem, layouts, device)
    timings = measure(problem, specs, layouts, weights)
    return timings, dict(zip(layouts, weights[0].metadata_shares, strict=True))


def measure(
    problem: Problem,
    specs: Mapping[str, KernelSpec],
    layouts: tuple[str, ...],
    weights: Sequence[SparseWeight],
) -> Timings:
    """us of the candidates at each bucket, best guesses first, within BUDGET_S.

    Args:
        layouts: those of `weights`.
        weights: random ones of the problem's shape, more than L2 holds.
    """
    deadline = time.monotonic() + BUDGET_S
    timings: Timings = {}
    for index, M in enumerate(BUCKETS):
        share = (deadline - time.monotonic()) / (len(BUCKETS) - index)
        until = time.monotonic() + share
        x = torch.randn(M, problem.K, device=weights[0].values.device).to(problem.dtype)

        def calls(candidate: Candidate, x: torch.Tensor = x) -> list[Call]:
            kernel, config = candidate
            place = layouts.index(specs[kernel].metadata)
            return [
                partial(specs[kernel].run, x, weight.values, weight.metadata[place], None, config)
                for weight in weights
            ]

        def prepare(candidate: Candidate, M: int = M) -> None:
            specs[candidate[0]].prepare(problem, candidate[1], M)

        guesses = {name: spec.configs(problem, M) for name, spec in specs.items()}
        timings[M] = race(guesses, prepare=prepare, calls=calls, until=until)
    return timings


def race(
    guesses: Mapping[str, Sequence[str]],
    *,
    prepare: Callable[[Candidate], None],
    calls: Callable[[Candidate], list[Call]],
    until: float,
) -> dict[Candidate, float]:
    """us of each candidate that was reached before `until`; first guesses always are.

    Args:
        guesses: kernel -> configs, the best guess first.
        calls: of a candidate, one a weight.
        until: of time.monotonic().
    """
    rough: dict[Candidate, float] = {}
    for kernel, configs in guesses.items():
        candidate = kernel, configs[0]
        prepare(candidate)
        call = calls(candidate)[0]
        call()
        rough[candidate] = stream_time_us(call)
    limit = HOPELESS * max(min(rough.values()), HOST_US)
    racing = [candidate for candidate, us in rough.items() if us <= limit]
    for candidate in _round_robin({kernel: guesses[kernel][1:] for kernel, _ in racing}):
        if time.monotonic() > until:
            break
        prepare(candidate)
        racing.append(candidate)
    samples = interleaved_time_us([rotation(calls(c)) for c in racing], repeats=REPEATS)
    return {**rough, **dict(zip(racing, map(statistics.median, samples), strict=True))}


def _round_robin(guesses: Mapping[str, Sequence[str]]) -> Iterator[Candidate]:
    """Every kernel's next guess in turn."""
    for turn in itertools.zip_longest(*([(k, c) for c in cs] for k, cs in guesses.items())):
        yield from (candidate for candidate in turn if candidate is not None)


def choose(timings: Timings, layout_of: Mapping[str, str], shares: Mapping[str, float]) -> Plan:
    """The fastest plan that keeps at most MAX_RESIDENT; one layout if that is nearly as fast.

    Args:
        timings: of candidates of every kernel of `layout_of` at each M.
        layout_of: kernel -> the metadata layout that it reads.
        shares: layout -> its bytes as part of the dense weight's.
    """
    best: tuple[float, Plan] | None = None
    for count in range(1, MAX_LAYOUTS + 1):
        for allowed in itertools.combinations(shares, count):
            # A padded layout alone may be more: then nothing smaller can run the layer.
            if count > 1 and 0.5 + sum(shares[layout] for layout in allowed) > MAX_RESIDENT:
                continue
            fastest = {
                M: min((us, c) for c, us in timed.items() if layout_of[c[0]] in allowed)
                for M, timed in timings.items()
            }
            cost = sum(math.log(us) for us, _ in fastest.values()) / len(fastest)
            cost += (count - 1) * SECOND_LAYOUT_GAIN
            if best is None or cost < best[0]:
                best = cost, Plan.of({M: candidate for M, (_, candidate) in fastest.items()})
    assert best is not None, "no kernel was timed"
    return best[1]


def _weights(
    problem: Problem, layouts: tuple[str, ...], device: torch.device
) -> list[SparseWeight]:
    """Random weights of the problem's shape, of which none is in L2 when its turn comes.

    Layers under about 2 MB stay in it: they are bound by launches, and a graph of a thousand calls
    takes longer to capture than all that is measured.
    """
    N, K = problem.N, problem.K
    nibbles = _ANY_TWO.to(device)[torch.randint(6, (N, K // 4), device=device)]
    mask = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    values = torch.randn(N, K // 2, device=device).to(problem.dtype)
    weight_bytes = values.nbytes + mask.nbytes
    copies = min(copies_past_l2(weight_bytes, device), MAX_COPIES)
    return [build(values.clone(), mask, layouts) for _ in range(copies)]
