"""A process with all that it started: who they are, their end, and whether they are gone."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable

import psutil


def family_of(pid: int) -> list[psutil.Process]:
    """The process `pid` and all that it started; empty where it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def kill_family(leader: int, family: Iterable[psutil.Process]) -> None:
    """SIGKILL to the process group `leader`, then to those of its `family` that have left it.

    The group dies in one call, whatever is being forked meanwhile. Members of the family may be
    gone when their turn comes, and the whole group too.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


def left_running(processes: Iterable[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those of `processes` that still run after `seconds`; returns as soon as none does.

    Not psutil.wait_procs: in a container whose first process reaps nothing, zombies stay.
    """
    end = time.monotonic() + seconds
    while (left := [one for one in processes if _runs(one)]) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
