"""cast-serve: runs the server (serve.py) in a child process and passes signals on to it.

Two processes, because a terminal sends Ctrl-C to its whole foreground group: vLLM's workers would
die of it under the requests that the engine is still draining, and an engine that is starting
answers signals with tracebacks, or not at all. The server has a session of its own, so only this
process hears the terminal. It imports nothing of vLLM and holds about 15 MB.
"""

import os
import signal
import subprocess
import sys
from types import FrameType
from typing import NoReturn

from cast_serve.server.family import family_of, kill_family, left_running
from cast_serve.server.parent import adopt_orphans

# The number of a pipe into which serve.py writes a byte once it serves.
READY_FD = "CAST_SERVE_READY_FD"
# The pid of this process, for serve.py.
PARENT = "CAST_SERVE_PARENT"

# How long what a server has left behind may take to end by itself. Python's resource trackers do in
# milliseconds, and first remove the shared memory that nobody has.
REST_SECONDS = 2

# The status of a server that has served and ended in good order. Whether it should have, only this
# process knows: vLLM ends its server in the same way when the engine has died.
ENDED = 3

# As argparse's; systemd and others do not start such a command anew.
WRONG_USAGE = 2


def main() -> None:
    """Console script. Exit status 0 after a clean stop, 1 on an error, 2 on wrong usage.

    A server that ends without having been told to is an error.

    Ctrl-C and SIGTERM drain the requests in flight (--shutdown-timeout says how long); a second
    one, or one before the server is up, ends at once; --check-only then exits with 128 + signal,
    as nothing was found out.
    """
    if "--version" in sys.argv[1:]:
        _print_versions()
        return
    adopt_orphans()
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    server: subprocess.Popen | None = None
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if server is None or stopping or not _is_serving(reader):
            # A server that is only just being started ends by itself without its parent.
            status = 128 + number if _only_checks(sys.argv[1:]) else 0
            end_now(None if server is None else server.pid, status)
        stopping = True
        server.terminate()

    # Before the server is started: by default a signal ends this process alone.
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    server = subprocess.Popen(
        [sys.executable, "-m", "cast_serve.server.serve", *sys.argv[1:]],
        env={**os.environ, READY_FD: str(writer), PARENT: str(os.getpid())},
        pass_fds=(writer,),
        start_new_session=True,
    )
    os.close(writer)
    status = server.wait()
    if status == ENDED:
        status = 0 if stopping else fail("the server ended by itself; the log above says why")
    elif status < 0:
        name = signal.strsignal(-status)
        fail(f"the server was ended by signal {-status} ({name}); `dmesg` says if memory ran out")
    # There is no server any more to pass them on to, and what is left ends in seconds.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _end_rest(server.pid)
    sys.exit(status if status >= 0 else 128 - status)


def _only_checks(arguments: list[str]) -> bool:
    """Whether --check-only is among them, as vLLM's parser takes it: cut short, or with `_`."""
    return any(
        len(given) > len("--che") and "--check-only".startswith(given.replace("_", "-"))
        for given in arguments
    )


def _end_rest(server: int) -> None:
    """End what a server that is gone has left: the engine of one that was killed holds the GPU."""
    rest = family_of(os.getpid())[1:]
    if left := left_running(rest, REST_SECONDS):
        kill_family(server, left)


def fail(reason: str, status: int = 1) -> int:
    """Print why to stderr, in a line; the exit status."""
    print(f"cast-serve: {reason}", file=sys.stderr, flush=True)
    return status


def _print_versions() -> None:
    from cast_serve.versions import describe, render

    print(render(describe()))


def _is_serving(reader: int) -> bool:
    try:
        return os.read(reader, 1) != b""
    except BlockingIOError:
        return False


def end_now(server: int | None, status: int = 0) -> NoReturn:
    """Exit and take every process of the server along."""
    if server is not None:
        kill_family(server, family_of(server))
    os._exit(status)


if __name__ == "__main__":
    main()
