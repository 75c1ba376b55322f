"""The processes of a benchmark: Python with arguments, and none left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import psutil

from cast_serve.server.parent import end_with_parent

STOP_SECONDS = 60
TAIL_LINES = 30


def start(command: Sequence[str], **streams: Any) -> subprocess.Popen:
    """Start Python with the arguments `command`; `streams` are Popen's.

    In a session of its own: Ctrl-C is this process's, which then ends it in order. Killed, this one
    takes it along, which would otherwise keep the GPU's memory.
    """
    return subprocess.Popen(
        [sys.executable, *command],
        start_new_session=True,
        preexec_fn=end_with_parent,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        **streams,
    )


def end(process: subprocess.Popen, seconds: float = STOP_SECONDS) -> None:
    """SIGTERM, and after `seconds` SIGKILL; returns when its whole family is gone.

    Only then is a GPU's memory free for the next engine. Not by process group alone: the server
    that cast-serve starts has one of its own.
    """
    family = []
    # Gone already where it failed; what it left behind is in its process group.
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        family = [root, *root.children(recursive=True)]
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    _wait_gone(family, 5)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    _wait_gone(family, seconds)
    process.wait()


def _wait_gone(family: Sequence[psutil.Process], seconds: float) -> None:
    """Return when none holds memory any more, or after `seconds`.

    Not psutil.wait_procs: in a container whose first process reaps nothing, zombies stay.
    """
    end = time.monotonic() + seconds
    while any(_is_alive(member) for member in family) and time.monotonic() < end:
        time.sleep(0.05)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def tail(log: str) -> str:
    """The end of a log, for an error message."""
    return "\n".join(log.rstrip().splitlines()[-TAIL_LINES:])
