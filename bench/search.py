"""The fastest configs of the kernels for a layer at one M: all of them are timed.

`cast_serve.kernels.tune` does this at load within seconds, and stops early. Here nothing is left
out but kernels that have no chance: every config is compiled, in threads, and timed once in a
graph; those near the front are timed again in turns, and judged.
"""

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from cast_serve.bench.accuracy import Judge, WrongResult
from cast_serve.bench.timing import fill_graph
from cast_serve.bench.weights import Copy
from cast_serve.kernels.measure import graph_time_us, interleaved_time_us, stream_time_us
from cast_serve.kernels.prepare import Candidate, prepare_all
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.spec import KernelSpec

# What one eager call may take beside the kernel on a slow host, where 100 was seen: with 60 here
# good configs for layers of a few microseconds were lost to noise.
LAUNCH_US = 500.0

# A kernel whose first guess is this much slower than another's is out: a kernel for decode takes
# tens of milliseconds at M = 8192. A config this much slower than the best one gets no graph.
HOPELESS_KERNEL = 3.0
HOPELESS_CONFIG = 1.5

# A kernel's configs this near to its best are timed again, at most so many of them.
NEAR = 1.08
FINALISTS = 4
REPEATS = 9


@dataclass(frozen=True, kw_only=True)
class Search:
    """A layer's kernels on copies of its weight.

    Attributes:
        specs: the kernels that support the problem, by name.
        copies: with the metadata layouts of all of them.
    """

    problem: Problem
    specs: Mapping[str, KernelSpec]
    copies: list[Copy]

    def calls(self, candidate: Candidate, x: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
        """The kernel on every copy of the weight."""
        name, config = candidate
        spec = self.specs[name]
        return [
            partial(spec.run, x, copy.sparse.values, copy.metadata(spec.metadata), None, config)
            for copy in self.copies
        ]

    def times(self, x: torch.Tensor, *, least_us: float) -> dict[Candidate, float]:
        """us a call of the candidates: exact for the best of each kernel that is in the race.

        What cannot be compiled, or is wrong, is named on stderr and left out; a kernel of which
        nothing remains has its first guess at infinity.

        Args:
            x: [M, K].
            least_us: what a call takes at least, for the length of the graphs.
        """
        M = x.shape[0]
        guesses = {name: spec.configs(self.problem, M) for name, spec in self.specs.items()}
        firsts = self._prepared([(name, configs[0]) for name, configs in guesses.items()], M)
        rough: dict[Candidate, float] = {}
        for candidate in firsts:
            call = self.calls(candidate, x)[0]
            call()
            rough[candidate] = stream_time_us(call)
        limit = HOPELESS_KERNEL * min(rough.values(), default=math.inf) + LAUNCH_US
        racing = [name for name, _ in firsts if rough[name, guesses[name][0]] <= limit]
        others = [(name, config) for name in racing for config in guesses[name][1:]]
        in_race = [candidate for candidate in firsts if candidate[0] in racing]
        best = math.inf
        for candidate in in_race + self._prepared(others, M):
            calls = self.calls(candidate, x)
            calls[0]()
            rough[candidate] = stream_time_us(calls[0])
            if rough[candidate] <= HOPELESS_CONFIG * best + LAUNCH_US:
                (rough[candidate],) = graph_time_us(fill_graph(calls, call_us=least_us), repeats=1)
                best = min(best, rough[candidate])
        timed = self._exact(rough, racing, x, least_us)
        # Kernels out of the race keep their rough time.
        out = {c: us for c, us in rough.items() if c[0] not in racing}
        found = {name for name, _ in (*timed, *out)}
        lost = {(name, guesses[name][0]): math.inf for name in guesses if name not in found}
        return {**timed, **out, **lost}

    def _exact(
        self, rough: Mapping[Candidate, float], racing: list[str], x: torch.Tensor, least_us: float
    ) -> dict[Candidate, float]:
        """The best of each kernel that are right, timed in turns."""
        judge = Judge.of(x, self.copies[0].dense)
        finalists = [
            candidate for candidate in _near_best(rough, racing) if self._right(judge, candidate, x)
        ]
        if not finalists:
            return {}
        graphs = [fill_graph(self.calls(c, x), call_us=least_us) for c in finalists]
        samples = interleaved_time_us(graphs, repeats=REPEATS)
        return dict(zip(finalists, map(statistics.median, samples), strict=True))

    def _prepared(self, candidates: Sequence[Candidate], M: int) -> list[Candidate]:
        """Compile the candidates for M; those that could be, in their order."""
        device = torch.device("cuda", torch.cuda.current_device())
        jobs = {candidate: [M] for candidate in candidates}
        ends = prepare_all(self.problem, self.specs, jobs, device)
        for (name, config), error in ends.items():
            if error is not None:
                print(f"{name} {config} at M={M} was not prepared: {error}", file=sys.stderr)
        return [candidate for candidate, error in ends.items() if error is None]

    def _right(self, judge: Judge, candidate: Candidate, x: torch.Tensor) -> bool:
        name, config = candidate
        try:
            judge.check(f"{name} {config}", self.calls(candidate, x)[0])
        except WrongResult as error:
            print(error, file=sys.stderr)
            return False
        return True


def _near_best(rough: Mapping[Candidate, float], racing: list[str]) -> list[Candidate]:
    """The few fastest candidates of each kernel in the race."""
    chosen: list[Candidate] = []
    for name in racing:
        own = sorted((us, candidate) for candidate, us in rough.items() if candidate[0] == name)
        chosen += [candidate for us, candidate in own[:FINALISTS] if us <= NEAR * own[0][0]]
    return chosen
