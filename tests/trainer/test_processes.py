"""The group of a run's processes, and what is left of it where one of them fails."""

import os

import pytest
import torch
from torch import distributed

from cast_serve.trainer.errors import RunError
from cast_serve.trainer.processes import join


@pytest.fixture
def calls(monkeypatch):
    """What this process, the first of two, does to the group."""
    found = []
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "init_process_group", lambda *_, **__: found.append("init"))
    monkeypatch.setattr(distributed, "all_reduce", lambda _: found.append("meet"))
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: found.append("destroy"))
    return found


def test_group_ends_with_the_block(calls):
    with join("cpu") as processes:
        assert (processes.rank, processes.count) == (0, 2)
    assert calls == ["init", "meet", "destroy"]


@pytest.mark.parametrize(("given", "used"), [(None, 2), ("1", 2), ("3", None)])
def test_cores_are_shared_out(calls, monkeypatch, given, used):
    """torchrun gives each process one thread, unless OMP_NUM_THREADS is set."""
    found = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(5)})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    with join("cpu"):
        pass
    assert found == ([] if used is None else [used])


def test_a_process_that_fails_does_not_wait_for_the_others(calls):
    """destroy_process_group does, and what the others wait for never comes."""
    with pytest.raises(RunError, match="disk full"), join("cpu"):
        raise RunError("disk full")
    assert calls == ["init"]
