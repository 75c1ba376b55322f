"""What has become of processes that are not this one's children."""

import time
from collections.abc import Iterable

import psutil


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
