"""Which plan the timings of kernels a, b and c lead to."""

import pytest

from cast_serve.kernels import tune
from cast_serve.kernels.registry import KERNELS

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
