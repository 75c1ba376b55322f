import pytest

from cast_serve.bench.timing import (
    FEWEST_REPEATS,
    MOST_REPEATS,
    Timing,
    count_repeats,
    fill_graph,
    limit_copies,
)

MIB = 1 << 20


def test_timing_of() -> None:
    assert Timing.of([5, 1, 3, 2, 4]) == Timing(3, 2)
    assert Timing.of([7.5]) == Timing(7.5, 0)


def test_timing_ignores_an_outlier() -> None:
    assert Timing.of([1, 1, 1, 1, 1000]) == Timing(1, 0)


def test_limit_copies() -> None:
    assert limit_copies(13, copy_bytes=50 * MIB, most_bytes=10_000 * MIB) == 13
    assert limit_copies(13, copy_bytes=50 * MIB, most_bytes=120 * MIB) == 2


@pytest.mark.parametrize("most_bytes", [99 * MIB, -MIB])
def test_limit_copies_refuses(most_bytes: int) -> None:
    with pytest.raises(ValueError, match=r"two weight copies of 50 MiB do not fit in .* leave the"):
        limit_copies(2, copy_bytes=50 * MIB, most_bytes=most_bytes)


def test_count_repeats() -> None:
    assert count_repeats(3000, budget_ms=60) == 20
    assert count_repeats(1, budget_ms=60) == MOST_REPEATS
    assert count_repeats(1e6, budget_ms=60) == FEWEST_REPEATS


@pytest.mark.parametrize(
    ("copies", "call_us", "rounds"),
    [(2, 5000.0, 1), (13, 8.0, 3), (13, 30.0, 1), (640, 0.1, 1), (3, 0.1, 50)],
)
def test_fill_graph(copies: int, call_us: float, rounds: int) -> None:
    calls = [lambda: None for _ in range(copies)]
    assert fill_graph(calls, call_us=call_us) == calls * rounds
