"""Which guesses are timed, and which plan the timings of kernels a, b and c lead to."""

import logging
import math
import time
from collections.abc import Sequence

import pytest
import torch
from layers import problem, random_packed

from cast_serve.kernels import tune
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.registry import KERNELS, REFERENCE
from cast_serve.kernels.spec import KernelSpec
from cast_serve.kernels.tune import Candidate, Trial, TuningError, Turn, race
from cast_serve.kernels.weight import build

LAYOUT_OF = {"a": "layout_a", "b": "layout_b", "c": "layout_c"}
SHARES = dict.fromkeys(LAYOUT_OF.values(), 0.0625)


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans may name the kernels a, b and c."""
    spec = KERNELS["mma_sp"]
    monkeypatch.setattr("cast_serve.kernels.plan.NAMED", dict.fromkeys(LAYOUT_OF, spec))


def chosen(times: dict[int, dict[str, float]], shares: dict[str, float] = SHARES) -> list[str]:
    """The kernel of each M."""
    timings = {M: {(k, "x"): us for k, us in timed.items()} for M, timed in times.items()}
    plan = tune.choose(timings, LAYOUT_OF, shares)
    return [plan.choice(M).kernel for M in times]


@pytest.mark.usefixtures("named")
def test_choose_the_fastest():
    assert chosen({1: {"a": 1, "b": 2, "c": 3}, 64: {"a": 9, "b": 4, "c": 8}}) == ["a", "b"]


@pytest.mark.usefixtures("named")
def test_choose_at_most_two_layouts():
    """c is fastest at the last M, but a and b together are the best pair."""
    times = {
        1: {"a": 1, "b": 5, "c": 5},
        64: {"a": 5, "b": 1, "c": 5},
        512: {"a": 5, "b": 4, "c": 3},
    }
    assert chosen(times) == ["a", "b", "b"]


@pytest.mark.usefixtures("named")
def test_choose_one_layout_if_the_second_gains_little():
    times = {1: {"a": 10, "b": 20, "c": 20}, 64: {"a": 10.1, "b": 10, "c": 20}}
    assert chosen(times) == ["a", "a"]


@pytest.mark.usefixtures("named")
def test_choose_keeps_to_the_memory_limit():
    """Padding makes b's layout large: it may stand alone, not beside another."""
    times = {1: {"a": 1, "b": 2, "c": 9}, 64: {"a": 4, "b": 2, "c": 9}}
    assert chosen(times) == ["a", "b"]
    assert chosen(times, {**SHARES, "layout_b": 0.1}) == ["a", "a"]
    assert chosen({1: {"a": 5, "b": 1, "c": 5}}, {**SHARES, "layout_b": 0.5}) == ["b"]


@pytest.mark.usefixtures("named")
def test_choose_where_a_kernel_did_not_run():
    """a is fastest, but alone it cannot run M = 64."""
    assert chosen({1: {"a": 1, "b": 5}, 64: {"b": 5}}) == ["a", "b"]
    assert chosen({1: {"a": 1, "b": 5}, 64: {"b": 5}}, {**SHARES, "layout_a": 0.1}) == ["b", "b"]


@pytest.mark.parametrize("last", [{}, {"c": 1}])
def test_choose_where_no_two_kernels_run(last):
    with pytest.raises(TuningError, match=r"ran at every M, .*\(M=1: a; M=8: b; M=64: (c|none)\)"):
        chosen({1: {"a": 1}, 8: {"b": 1}, 64: last})


class Fake:
    """A GPU on which candidates take the us of `times`; nan: they cannot be prepared."""

    def __init__(self, times: dict[Candidate, float], *, late_after: int = 1000) -> None:
        self.times = times
        self.turns: list[list[Candidate]] = []
        self.exact: list[Candidate] = []
        self.late_after = late_after

    def prepare(self, turn: Turn, until: float) -> Turn:
        self.turns.append([candidate for candidates in turn.values() for candidate in candidates])
        late = len(self.turns) > self.late_after and until < math.inf
        return {
            M: [c for c in candidates if not late and not math.isnan(self.times[c])]
            for M, candidates in turn.items()
        }

    def time_us(self, M: int, candidates: Sequence[Candidate], repeats: int):
        if repeats == tune.REPEATS:
            self.exact += candidates
        return {candidate: self.times[candidate] for candidate in candidates}

    def race(self, *, seconds: float = 60) -> dict[Candidate, float]:
        guesses: dict[str, list[str]] = {}
        for kernel, config in self.times:
            guesses.setdefault(kernel, []).append(config)
        until = time.monotonic() + seconds
        return race({8: guesses}, prepare=self.prepare, time_us=self.time_us, until=until)[8]


def guesses_of(kernel: str, *us: float) -> dict[Candidate, float]:
    return {(kernel, str(index)): time for index, time in enumerate(us)}


def test_race_goes_on_with_kernels_that_are_near():
    """The first guesses of all; then four of the leader for each of another, none of the rest."""
    fake = Fake(guesses_of("a", *[14] * 9) | guesses_of("b", *[10] * 9) | guesses_of("c", 16, 1))
    timed = fake.race()
    assert fake.turns == [
        [("a", "0"), ("b", "0"), ("c", "0")],
        [("a", "1"), *(("b", str(index)) for index in range(1, 5))],
        [("a", "2"), *(("b", str(index)) for index in range(5, 9))],
        *([("a", str(index))] for index in range(3, 9)),
    ]
    assert timed["c", "0"] == 16


def test_race_times_the_fastest_again():
    fake = Fake(guesses_of("a", 10, 12, 9.5, 9, 9.6, 9.7, 9.1) | guesses_of("b", 13, 16))
    timed = fake.race()
    assert fake.exact == [("a", "3"), ("a", "6"), ("a", "2"), ("a", "4"), ("b", "0")]
    assert set(timed) == set(fake.exact)


def test_race_ends_in_time():
    fake = Fake(guesses_of("a", *[10] * 9))
    assert set(fake.race(seconds=-1)) == {("a", "0")}
    fake = Fake(guesses_of("a", *[10] * 9), late_after=1)
    assert set(fake.race()) == {("a", "0")}


def test_race_waits_for_a_guess_that_runs():
    """However late it is; but not for a kernel of which nothing runs."""
    nan = math.nan
    fake = Fake(guesses_of("a", nan, nan, 5, 6) | guesses_of("b", nan, nan, nan, 1), late_after=0)
    assert fake.race(seconds=-1) == {("a", "2"): 5}
    fake = Fake(guesses_of("a", nan, nan, nan, 5))
    assert fake.race() == {}
    assert len(fake.turns) == tune.CHANCES


def test_what_cannot_be_prepared_is_named_once(caplog):
    def prepare(problem: Problem, config: str, M: int) -> None:
        if config == "bad":
            raise RuntimeError("registers")

    spec = KernelSpec(
        name="a",
        metadata="mask",
        supports=REFERENCE.supports,
        configs=REFERENCE.configs,
        prepare=prepare,
        run=REFERENCE.run,
    )
    weight = build(*random_packed(32, 64, torch.float32, "cpu"), ("mask",))
    trial = Trial(problem=problem(), specs={"a": spec}, layouts=("mask",), weights=[weight])
    turn = {8: [("a", "bad"), ("a", "good")], 64: [("a", "bad")]}
    with caplog.at_level(logging.WARNING):
        assert trial.prepare(turn, math.inf) == {8: [("a", "good")], 64: []}
        assert trial.prepare({512: [("a", "bad")]}, math.inf) == {512: []}
    (record,) = caplog.records
    assert record.getMessage() == f"a bad is left out for {problem()}: registers"


@pytest.mark.gpu
def test_what_does_not_run_is_named(caplog):
    """The rest of the turn is timed; a kernel with no chance, from the host."""

    def run(x, values, metadata, bias, config):
        if config == "bad":
            raise RuntimeError("too many resources")
        if config == "slow":
            torch.cuda._sleep(100_000_000)
        return torch.empty_like(x)

    spec = KernelSpec(
        name="a",
        metadata="mask",
        supports=REFERENCE.supports,
        configs=REFERENCE.configs,
        prepare=REFERENCE.prepare,
        run=run,
    )
    weight = build(*random_packed(32, 64, torch.bfloat16, "cuda"), ("mask",))
    here = Problem.on(weight.values.device, N=32, K=64, dtype=torch.bfloat16)
    trial = Trial(problem=here, specs={"a": spec}, layouts=("mask",), weights=[weight] * 2)
    candidates = [("a", "bad"), ("a", "good"), ("a", "slow")]
    with caplog.at_level(logging.WARNING):
        times = trial.time_us(8, candidates, repeats=3)
    assert set(times) == {("a", "good"), ("a", "slow")}
    # Tens of milliseconds are more than what another program on the same GPU takes of it.
    assert times["a", "slow"] > times["a", "good"]
    assert "a bad is left out" in caplog.text
