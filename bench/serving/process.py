"""The processes of a benchmark: Python with arguments, and none left behind."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from cast_serve.server.family import family_of, kill_family, left_running
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
        preexec_fn=partial(end_with_parent, os.getpid()),
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        **streams,
    )


def end(process: subprocess.Popen, patience: float = STOP_SECONDS) -> None:
    """SIGTERM, and after `patience` seconds SIGKILL; returns when its whole family is gone.

    Only then is a GPU's memory free for the next engine. Not by process group alone: the server
    that cast-serve starts has one of its own.
    """
    # Gone already where it failed; what it left behind is in its process group.
    family = family_of(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    left_running(family, 5)
    kill_family(process.pid, family)
    left_running(family, STOP_SECONDS)
    process.wait()


def tail(log: str) -> str:
    """The end of a log, for an error message."""
    return "\n".join(log.rstrip().splitlines()[-TAIL_LINES:])
