"""The process that hears the terminal, and what becomes of a server that it ends at once."""

import subprocess
import sys
import time

import psutil
import pytest

# A server with two children that stay, one in a session of its own, and others that come and go, as
# the compilers and the lscpu of an engine that starts: such a one may end between being found and
# being killed.
STARTING = "sleep 300 & setsid sleep 300 & for one in 1 2 3; do while :; do /bin/true; done & done"

# Ends the server of the pid that it is given.
END = "import sys; from cast_serve.server.main import end_now; end_now(int(sys.argv[1]))"


@pytest.mark.parametrize("attempt", range(5))
def test_end_takes_all_along(attempt):
    server = subprocess.Popen(["bash", "-c", f"{STARTING}; wait"], start_new_session=True)
    while len(family := psutil.Process(server.pid).children(recursive=True)) < 5:
        time.sleep(0.01)
    ended = subprocess.run([sys.executable, "-c", END, str(server.pid)], capture_output=True)
    assert ended.stderr == b""
    assert ended.returncode == 0
    server.wait(timeout=10)
    assert psutil.wait_procs(family, timeout=10)[1] == []
