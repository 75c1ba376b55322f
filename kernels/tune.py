"""Tuning: which kernel and config is fastest for a layer on this GPU, by timing them.

At each M of BUCKETS every kernel's first guess is timed. Then guesses take turns, best first: those
of the kernel that leads, and now and then one of another that is near. Each turn compiles for all
buckets at once, in threads. The few fastest of a bucket are timed again, against each other.

Takes about 5-10 s a shape on a machine of 16 cores: `BUDGET_S` and what was begun within it, the
last timing (1-2 s), and random weights. Fewer cores time fewer guesses; the first ones are waited
for. Timings are of CUDA graphs over rotated weights (`measure.py`). A config that does not compile
or run is named in a warning and left out. A plan keeps at most `MAX_RESIDENT` of the dense
weight's bytes.
"""

import functools
import itertools
import logging
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from cast_serve.kernels.measure import (
    Call,
    copies_past_l2,
    interleaved_time_us,
    rotation,
    stream_time_us,
)
from cast_serve.kernels.pattern import random_mask
from cast_serve.kernels.plan import BUCKETS, Plan
from cast_serve.kernels.prepare import FATAL, Candidate, failures, prepare_all
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.registry import KERNELS
from cast_serve.kernels.spec import KernelSpec
from cast_serve.kernels.weight import SparseWeight, build

logger = logging.getLogger(__name__)

# Seconds a shape after which no further guess is begun. Layers of one model share most of what is
# compiled, so the first takes longest; without a table a Llama, which has four, loads half a minute
# slower, once.
BUDGET_S = 7.0

# Of the dense weight's bytes, what a layer may keep: the values are 0.5 and each metadata layout is
# 0.0625, more where its tiles are padded, so there is room for two.
MAX_RESIDENT = 0.63
MAX_LAYOUTS = 2

# A second layout has to make the layer this much faster, in the geometric mean over BUCKETS.
SECOND_LAYOUT_GAIN = 0.02

# Guesses a turn of the kernel that leads, and of each other that is at most so much slower at its
# best. On sm_90 that leaves nearly all turns to wgmma_sp, which led at every M on an H100.
LEADERS_TURN = 4
OTHERS_TURN = 1
IN_RACE = 1.5

# A kernel of which so many guesses failed at a bucket, and none ran, is out.
CHANCES = 3

# A kernel's guesses this near to its best are timed again, at most so many of them.
NEAR = 1.08
FINALISTS = 4

# A candidate this much slower than another of its turn gets no graph: kernels for decode take tens
# of milliseconds at M = 8192.
HOPELESS = 3.0

# What launching a call may take on a slow host: below that a rough time says nothing of the GPU.
HOST_US = 100.0

# Events are exact to about 1 us, so a longer graph is no more exact.
GRAPH_US = 3000.0

QUICK_REPEATS = 3
REPEATS = 7
MAX_COPIES = 128

Turn = dict[int, list[Candidate]]  # M -> what is timed at it next
Timings = dict[int, dict[Candidate, float]]  # M -> candidate -> us


class TuningError(RuntimeError):
    """Nothing can be timed or compiled here and now."""


def tune(problem: Problem, device: torch.device) -> Plan:
    """The fastest plan for `problem` on `device`, measured now: seconds, and synchronises.

    Raises:
        TuningError: there is no memory to measure in, or no kernel ran.
    """
    specs = {name: spec for name, spec in KERNELS.items() if spec.supports(problem) is None}
    try:
        with torch.cuda.device(device), torch.inference_mode():
            timings, shares = _measure_on(problem, specs, device)
    except torch.OutOfMemoryError as error:
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
    until = time.monotonic() + BUDGET_S
    layouts = tuple(dict.fromkeys(spec.metadata for spec in specs.values()))
    weights = _weights(problem, layouts, device)
    trial = Trial(problem=problem, specs=specs, layouts=layouts, weights=weights)
    guesses = {M: {name: spec.configs(problem, M) for name, spec in specs.items()} for M in BUCKETS}
    timings = race(guesses, prepare=trial.prepare, time_us=trial.time_us, until=until)
    return timings, dict(zip(layouts, weights[0].metadata_shares, strict=True))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Kernels on random weights of the problem's shape, together more than L2 holds.

    Attributes:
        layouts: those of `weights`.
        broken: candidates that failed, each of them named in a warning.
    """

    problem: Problem
    specs: Mapping[str, KernelSpec]
    layouts: tuple[str, ...]
    weights: Sequence[SparseWeight]
    broken: set[Candidate] = field(default_factory=set)

    @property
    def device(self) -> torch.device:
        return self.weights[0].values.device

    def prepare(self, turn: Turn, until: float) -> Turn:
        """`turn` without what fails, has failed, or was not begun by `until`."""
        jobs: dict[Candidate, list[int]] = {}
        for M, candidates in turn.items():
            for candidate in candidates:
                if candidate not in self.broken:
                    jobs.setdefault(candidate, []).append(M)
        ends = prepare_all(self.problem, self.specs, jobs, self.device, until=until)
        for candidate, error in ends.items():
            if error is not None:
                self._leave_out(candidate, error)
        ready = ends.keys() - self.broken
        return {M: [c for c in candidates if c in ready] for M, candidates in turn.items()}

    def time_us(
        self, M: int, candidates: Sequence[Candidate], repeats: int
    ) -> dict[Candidate, float]:
        """us of the candidates that run; of those without a chance, one call from the host."""
        x = torch.randn(M, self.problem.K, device=self.device).to(self.problem.dtype)
        calls = {candidate: self._calls(candidate, x) for candidate in candidates}
        rough: dict[Candidate, float] = {}
        for candidate, (call, *_) in calls.items():
            try:
                call()
                rough[candidate] = stream_time_us(call)
            except FATAL:
                raise
            except failures() as error:
                self._leave_out(candidate, error)
        limit = HOPELESS * max(min(rough.values(), default=math.inf), HOST_US)
        fair = [candidate for candidate, us in rough.items() if us <= limit]
        graphs = [_graph(calls[candidate], rough[candidate]) for candidate in fair]
        samples = interleaved_time_us(graphs, repeats=repeats)
        return {**rough, **dict(zip(fair, map(statistics.median, samples), strict=True))}

    def _calls(self, candidate: Candidate, x: torch.Tensor) -> list[Call]:
        """The kernel on every weight."""
        kernel, config = candidate
        spec = self.specs[kernel]
        place = self.layouts.index(spec.metadata)
        return [
            functools.partial(spec.run, x, weight.values, weight.metadata[place], None, config)
            for weight in self.weights
        ]

    def _leave_out(self, candidate: Candidate, error: Exception) -> None:
        self.broken.add(candidate)
        logger.warning("%s %s is left out for %s: %s", *candidate, self.problem, error)


def race(
    guesses: Mapping[int, Mapping[str, Sequence[str]]],
    *,
    prepare: Callable[[Turn, float], Turn],
    time_us: Callable[[int, Sequence[Candidate], int], dict[Candidate, float]],
    until: float,
) -> Timings:
    """us at each M: of every kernel's fastest, and near it, of the guesses reached by `until`.

    A bucket at which nothing has run yet goes on after that.

    Args:
        guesses: M -> kernel -> configs, the best guess first.
        prepare: makes a turn's candidates ready by the time given; returns those that are.
        time_us: of candidates at M, by so many repeats; without those that do not run.
        until: of time.monotonic().
    """
    tried = {M: Counter[str]() for M in guesses}
    timed: Timings = {M: {} for M in guesses}
    while True:
        waited_for = not all(timed.values())
        if time.monotonic() > until and not waited_for:
            break
        turn = {M: next_guesses(guesses[M], tried[M], timed[M]) for M in guesses}
        if not any(turn.values()):
            break
        for M, candidates in turn.items():
            tried[M].update(kernel for kernel, _ in candidates)
        for M, candidates in prepare(turn, math.inf if waited_for else until).items():
            timed[M] |= time_us(M, candidates, QUICK_REPEATS)
    for M, times in timed.items():
        last = finalists(times)
        exact = time_us(M, last, REPEATS)
        in_race = {kernel for kernel, _ in last}
        timed[M] = {c: us for c, us in times.items() if c[0] not in in_race} | exact
    return timed


def next_guesses(
    configs: Mapping[str, Sequence[str]],
    tried: Mapping[str, int],
    times: Mapping[Candidate, float],
) -> list[Candidate]:
    """What a bucket tries next: every kernel's first guess, then those of kernels in the race.

    Args:
        configs: kernel -> configs, the best guess first.
        tried: kernel -> how many of them are behind it.
        times: of those that ran.
    """
    best = _best(times)
    lead = min(best.values(), default=math.inf)

    def count(kernel: str) -> int:
        if kernel not in best:
            return OTHERS_TURN if tried[kernel] < CHANCES else 0
        if best[kernel] == lead:
            return LEADERS_TURN
        return OTHERS_TURN if best[kernel] <= IN_RACE * lead else 0

    return [
        (kernel, name)
        for kernel, names in configs.items()
        for name in names[tried[kernel] : tried[kernel] + count(kernel)]
    ]


def finalists(times: Mapping[Candidate, float]) -> list[Candidate]:
    """The few fastest guesses of each kernel in the race."""
    best = _best(times)
    chosen: list[Candidate] = []
    for kernel, us in best.items():
        if us <= IN_RACE * min(best.values()):
            near = [c for c, t in times.items() if c[0] == kernel and t <= NEAR * us]
            chosen += sorted(near, key=lambda c: times[c])[:FINALISTS]
    return chosen


def _best(times: Mapping[Candidate, float]) -> dict[str, float]:
    """us of each kernel's fastest."""
    best: dict[str, float] = {}
    for (kernel, _), us in times.items():
        best[kernel] = min(us, best.get(kernel, math.inf))
    return best


def choose(timings: Timings, layout_of: Mapping[str, str], shares: Mapping[str, float]) -> Plan:
    """The fastest plan that keeps at most MAX_RESIDENT; one layout if that is nearly as fast.

    Args:
        timings: of candidates at each M.
        layout_of: kernel -> the metadata layout that it reads.
        shares: layout -> its bytes as part of the dense weight's.

    Raises:
        TuningError: no kernels that a plan may hold together were timed at every M.
    """
    best: tuple[float, Plan] | None = None
    for count in range(1, MAX_LAYOUTS + 1):
        for allowed in itertools.combinations(shares, count):
            # A padded layout alone may be more: then nothing smaller can run the layer.
            if count > 1 and 0.5 + sum(shares[layout] for layout in allowed) > MAX_RESIDENT:
                continue
            able = {
                M: [(us, c) for c, us in timed.items() if layout_of[c[0]] in allowed]
                for M, timed in timings.items()
            }
            if not all(able.values()):
                continue
            fastest = {M: min(candidates) for M, candidates in able.items()}
            cost = sum(math.log(us) for us, _ in fastest.values()) / len(fastest)
            cost += (count - 1) * SECOND_LAYOUT_GAIN
            if best is None or cost < best[0]:
                best = cost, Plan.of({M: candidate for M, (_, candidate) in fastest.items()})
    if best is None:
        ran = "; ".join(f"M={M}: {_names(timed) or 'none'}" for M, timed in timings.items())
        raise TuningError(
            f"no kernel, and no two that fit into {MAX_RESIDENT} of the dense weight's bytes, ran "
            f"at every M, for the reasons in the warnings above ({ran})"
        )
    return best[1]


def _names(timed: Iterable[Candidate]) -> str:
    return ", ".join(dict.fromkeys(kernel for kernel, _ in timed))


def _graph(calls: Sequence[Call], us: float) -> list[Call]:
    """What one graph holds: whole rounds, or as many calls of `us` as make GRAPH_US."""
    whole = rotation(calls)
    # Host time would make short calls look long, and the graph leave out weights that L2 then has.
    return whole if us <= HOST_US else whole[: max(2, math.ceil(GRAPH_US / us))]


def _weights(
    problem: Problem, layouts: tuple[str, ...], device: torch.device
) -> list[SparseWeight]:
    """Random weights of the problem's shape, of which none is in L2 when its turn comes.

    Layers under about 2 MB stay in it: they are bound by launches, and a graph of a thousand calls
    takes longer to capture than all that is measured.
    """
    N, K = problem.N, problem.K
    # All random, as x is: power, and with it the clock, depends on the data.
    mask = random_mask(N, K, torch.Generator(device))
    values = torch.randn(N, K // 2, device=device).to(problem.dtype)
    weight_bytes = values.nbytes + mask.nbytes
    copies = min(copies_past_l2(weight_bytes, device), MAX_COPIES)
    return [build(values.clone(), mask, layouts) for _ in range(copies)]
