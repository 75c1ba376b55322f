"""The order of a run: determinism, shares, resumption, and processes that share out the items."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cast_serve.trainer.data.mixture import Mixture
from cast_serve.trainer.data.stream import BlockStream, collate

WEIGHTS = st.lists(st.floats(0.01, 1), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**32 - 1)


def shares_of(weights):
    return [weight / sum(weights) for weight in weights]


def numbered(*counts):
    """Parts of `counts` blocks of one token, which tells part and block."""
    return [torch.arange(count)[:, None] + 1000 * part for part, count in enumerate(counts)]


def tokens(stream, indices):
    return [stream[index]["input_ids"].item() for index in indices]


@given(weights=WEIGHTS, seed=SEEDS, length=st.integers(0, 300))
def test_mixture_keeps_its_shares_in_every_prefix(weights, seed, length):
    shares = shares_of(weights)
    mixture = Mixture(shares, length=length, seed=seed)
    counts = [0] * len(shares)
    for index in range(length):
        source, place = mixture[index]
        assert place == counts[source]
        counts[source] += 1
        for share, count in zip(shares, counts, strict=True):
            # Another source may be up to an item ahead of its share, or behind it.
            assert abs(count - share * (index + 1)) <= len(shares)


@given(weights=WEIGHTS, seed=SEEDS, length=st.integers(0, 200), more=st.integers(0, 200))
def test_mixture_does_not_depend_on_the_length(weights, seed, length, more):
    short, long = (
        Mixture(shares_of(weights), length=n, seed=seed) for n in (length, length + more)
    )
    assert len(short) == length
    assert [short[i] for i in range(length)] == [long[i] for i in range(length)]


def test_mixture_has_no_period():
    mixture = Mixture([0.5, 0.5], length=64, seed=0)
    sources = [mixture[i][0] for i in range(64)]
    assert sources != [0, 1] * 32 and sources != [1, 0] * 32


def test_block_stream_is_a_permutation_each_epoch():
    stream = BlockStream(*numbered(10), length=20, seed=3)
    order = tokens(stream, range(20))
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


def test_block_stream_repeats_a_source_smaller_than_its_share():
    stream = BlockStream(*numbered(3, 100), length=40, seed=1, shares=[0.75, 0.25])
    read = tokens(stream, range(40))
    small = [token for token in read if token < 1000]
    assert abs(len(small) - 30) <= 2
    for epoch in range(len(small) // 3):
        assert sorted(small[3 * epoch : 3 * epoch + 3]) == [0, 1, 2]
    large = [token for token in read if token >= 1000]
    assert len(set(large)) == len(large)


def test_block_stream_seeds_differ():
    streams = [
        BlockStream(*numbered(50, 50), length=50, seed=seed, shares=[0.5, 0.5]) for seed in (3, 4)
    ]
    assert tokens(streams[0], range(50)) != tokens(streams[1], range(50))


def test_block_stream_shuffles_each_part_on_its_own():
    same = [torch.arange(30)[:, None], torch.arange(30)[:, None] + 1000]
    stream = BlockStream(*same, length=60, seed=0, shares=[0.5, 0.5])
    read = tokens(stream, range(60))
    first, second = ([t % 1000 for t in read if t // 1000 == part] for part in (0, 1))
    assert first[:20] != second[:20]


@settings(deadline=None)
@given(
    weights=WEIGHTS,
    counts=st.lists(st.integers(1, 20), min_size=5, max_size=5),
    seed=SEEDS,
    length=st.integers(1, 120),
    draw=st.randoms(use_true_random=False),
)
def test_block_stream_depends_on_the_index_alone(weights, counts, seed, length, draw):
    parts, shares = numbered(*counts[: len(weights)]), shares_of(weights)
    straight = tokens(BlockStream(*parts, length=length, seed=seed, shares=shares), range(length))
    # Resumed: a fresh stream that is asked from the middle on.
    done = draw.randrange(length)
    resumed = BlockStream(*parts, length=length, seed=seed, shares=shares)
    assert tokens(resumed, range(done, length)) == straight[done:]
    # Any order of asking.
    indices = draw.sample(range(length), length)
    assert tokens(resumed, indices) == [straight[index] for index in indices]


@settings(deadline=None)
@given(
    processes=st.integers(1, 6), a_process=st.integers(1, 4), steps=st.integers(1, 6), seed=SEEDS
)
def test_processes_together_read_what_one_reads(processes, a_process, steps, seed):
    """Process p of P takes items [p * a_process, (p + 1) * a_process) of each step."""
    step = processes * a_process
    settings = {"length": steps * step, "seed": seed, "shares": [0.3, 0.7]}
    alone = tokens(BlockStream(*numbered(7, 11), **settings), range(steps * step))
    streams = [BlockStream(*numbered(7, 11), **settings) for _ in range(processes)]
    for number in range(steps):
        together = []
        for place in random.Random(seed).sample(range(processes), processes):
            first = number * step + place * a_process
            together += zip(
                range(first, first + a_process),
                tokens(streams[place], range(first, first + a_process)),
                strict=True,
            )
        assert [token for _, token in sorted(together)] == alone[number * step :][:step]


def test_block_stream_ends():
    stream = BlockStream(*numbered(5), length=7, seed=0)
    assert len(list(stream)) == len(stream) == 7
    with pytest.raises(IndexError, match="item 7 of a run of 7"):
        stream[7]


def test_collate():
    stream = BlockStream(torch.tensor([[5, 0, 6, 7]]), length=2, seed=0, eos=0)
    batch = collate([stream[0], stream[1]])
    assert batch["input_ids"].tolist() == [[5, 0, 6, 7]] * 2
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1]] * 2
    assert set(collate([BlockStream(torch.ones(1, 4), length=1, seed=0)[0]])) == {"input_ids"}
