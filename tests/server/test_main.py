"""The process that hears the terminal, and what becomes of a server that it ends at once."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from cast_serve.server.family import left_running

# A server with two children that stay, one in a session of its own, and others that come and go, as
# the compilers and the lscpu of an engine that starts: such a one may end between being found and
# being killed.
STARTING = "sleep 300 & setsid sleep 300 & for one in 1 2 3; do while :; do /bin/true; done & done"

# Ends the server of the pid that it is given.
END = "import sys; from cast_serve.server.main import end_now; end_now(int(sys.argv[1]))"


@pytest.fixture
def starting() -> Iterator[psutil.Process]:
    process = subprocess.Popen(["bash", "-c", f"{STARTING}; wait"], start_new_session=True)
    yield psutil.Process(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=10)


@pytest.mark.parametrize("attempt", range(20))
def test_end_takes_all_along(starting, attempt):
    while len(family := starting.children(recursive=True)) < 5:
        time.sleep(0.01)
    ended = subprocess.run([sys.executable, "-c", END, str(starting.pid)], capture_output=True)
    assert ended.stderr == b""
    assert ended.returncode == 0
    assert left_running([starting, *family], seconds=10) == []
