"""The process that hears the terminal, and what becomes of a server that it ends at once, or that
ends without it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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


# A server that is killed, with an engine in its process group and a worker in another session.
KILLED = """#!/bin/bash
sleep 300 & echo $!
setsid sleep 300 & echo $!
sleep 0.5
kill -9 $$
"""

# What runs in the place of Python, and with it of the server.
MAIN = """import sys; from cast_serve.server.main import main
sys.executable = sys.argv.pop(1); main()"""


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.Popen]:
    """Starts the command with a script in the place of its server, once that has said "up"."""

    def start(script: str, *flags: str) -> subprocess.Popen:
        (tmp_path / "python").write_text(script)
        (tmp_path / "python").chmod(0o755)
        command = [sys.executable, "-c", MAIN, str(tmp_path / "python"), *flags]
        running = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert running.stdout is not None
        assert running.stdout.readline() == b"up\n"
        return running

    return start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("flags", "ended"),
    [
        (["--check"], True),
        (["--check_only"], True),
        (["--model", "dir", "--check-only"], True),
        (["--ch", "--chat-template", "x"], False),
        ([], False),
    ],
)
def test_status_of_what_is_stopped_before_it_serves(command, number, flags, ended):
    """0, but of a check: a script would take it for passed."""
    running = command("#!/bin/sh\necho up\nexec sleep 300\n", *flags)
    running.send_signal(number)
    assert running.wait(timeout=30) == (128 + number if ended else 0)


def test_child_whose_parent_was_killed_at_once_ends(tmp_path):
    """A process of Python takes a while before it can ask for the death of its parent."""
    late = (
        "import os, time; parent = os.getppid(); print('up', flush=True)\n"
        "from cast_serve.server.parent import end_with_parent\n"
        "while os.getppid() == parent: time.sleep(0.01)\n"
        "end_with_parent(parent); time.sleep(300)"
    )
    parent = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', sys.argv[1]])\n"
        "print(child.pid, flush=True); child.wait()"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", parent, late], stdout=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    child = psutil.Process(int(running.stdout.readline()))
    assert running.stdout.readline() == "up\n"
    running.kill()
    running.wait(timeout=30)
    assert left_running([child], seconds=10) == []


def test_nothing_stays_of_a_server_that_is_killed(tmp_path: Path):
    (tmp_path / "python").write_text(KILLED)
    (tmp_path / "python").chmod(0o755)
    command = [sys.executable, "-c", MAIN, str(tmp_path / "python")]
    with (tmp_path / "pids").open("w") as pids, (tmp_path / "errors").open("w") as errors:
        ended = subprocess.run(command, stdout=pids, stderr=errors, timeout=60)
    left = []
    for pid in (tmp_path / "pids").read_text().split():
        with contextlib.suppress(psutil.NoSuchProcess):
            left.append(psutil.Process(int(pid)))
    try:
        assert left_running(left, seconds=5) == []
    finally:
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    assert ended.returncode == 128 + signal.SIGKILL
    (line,) = (tmp_path / "errors").read_text().splitlines()
    assert line.startswith("cast-serve: the server was ended by signal 9 (Killed);")
