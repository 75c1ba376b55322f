"""Which of several processes prints an error: the store is torch's own, as torchrun's agent has."""

from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from cast_serve.trainer import said_once
from cast_serve.trainer.said_once import say_once


@pytest.fixture
def rank(monkeypatch):
    """Makes this process one of two that torchrun has started."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(said_once, "_PATIENCE", timedelta(seconds=0.3))
    yield lambda number: monkeypatch.setenv("RANK", str(number))
    del store


def said(message):
    found = []
    say_once(message, found.append)
    return found


def test_what_all_find_is_said_by_the_first(rank):
    rank(0)
    assert said("bad") == ["bad"]
    rank(1)
    assert said("bad") == []


def test_what_another_finds_is_said_by_it(rank):
    rank(1)
    assert said("bad") == ["bad"]
    rank(0)
    assert said("worse") == ["worse"]
    rank(1)
    assert said("bad") == ["bad"]


def test_a_restart_says_it_again(rank, monkeypatch):
    rank(0)
    said("bad")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    rank(1)
    assert said("bad") == ["bad"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param("WORLD_SIZE", "1", id="alone"),
        pytest.param("TORCHELASTIC_USE_AGENT_STORE", "False", id="no agent"),
        pytest.param("MASTER_PORT", "1", id="no store"),
    ],
)
def test_without_a_store_every_process_says_it(rank, monkeypatch, key, value):
    rank(0)
    said("bad")
    rank(1)
    monkeypatch.setenv(key, value)
    assert said("bad") == ["bad"]
