"""Rate and decay over a run."""

import math

import pytest

from cast_serve.trainer.schedule import Schedule


def test_rate_endpoints():
    schedule = Schedule(steps=100, warmup=0.05, floor=0.1)
    assert schedule.rate(1) == pytest.approx(1 / 5)
    assert schedule.rate(5) == 1
    assert schedule.rate(100) == pytest.approx(0.1)


def test_rate_is_a_half_cosine():
    schedule = Schedule(steps=105, warmup=5 / 105, floor=0.1)
    assert schedule.rate(55) == pytest.approx(0.55)
    assert schedule.rate(30) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


def test_rate_without_warmup_starts_next_to_the_peak():
    assert 0.99 < Schedule(steps=100, warmup=0, floor=0.1).rate(1) < 1


def test_decay_is_linear_over_the_run():
    schedule = Schedule(steps=8, warmup=0, floor=0.1)
    assert [schedule.decay(t) for t in (1, 4, 8)] == [1 / 8, 1 / 2, 1]


def test_decay_ramp_fades_in_over_a_share_of_the_run():
    schedule = Schedule(steps=8, warmup=0, floor=0.1, decay_ramp=0.5)
    assert [schedule.decay(t) for t in (1, 2, 4, 5, 8)] == [1 / 4, 1 / 2, 1, 1, 1]


def test_factor_counts_from_zero():
    schedule = Schedule(steps=40, warmup=0.1, floor=0.1)
    assert [schedule.factor()(done) for done in range(40)] == [
        schedule.rate(t) for t in range(1, 41)
    ]


def test_reach_sums_rate_times_decay():
    schedule = Schedule(steps=4, warmup=0.5, floor=0.2)
    # t: 1, 2 warm up to 1/2 and 1; 3 is half way down to 0.2, 4 is 0.2.
    assert schedule.reach() == pytest.approx(0.5 * 0.25 + 1 * 0.5 + 0.6 * 0.75 + 0.2 * 1)


def test_reach_knows_the_ramp():
    linear, ramped = (
        Schedule(steps=4, warmup=0.5, floor=0.2, decay_ramp=ramp).reach() for ramp in (1.0, 0.5)
    )
    assert ramped == pytest.approx(0.5 * 0.5 + 1 * 1 + 0.6 * 1 + 0.2 * 1)
    assert ramped > linear
