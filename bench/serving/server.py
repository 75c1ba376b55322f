"""A server as a process: started, waited for, read for what it says of itself, and ended."""

import contextlib
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from cast_serve.bench.serving.process import STOP_SECONDS, end, start, tail

# Loading, compiling and capturing graphs takes 40-90 s on an H100.
START_SECONDS = 300
POLL_SECONDS = 0.5
# One that does not serve yet drains nothing, and stock vLLM hears no SIGTERM for most of its start.
ABANDON_SECONDS = 5

# Reading alone; the only line where the runner is a CPU's.
_READING = re.compile(r"Loading weights took ([\d.]+) seconds")
_WEIGHTS = re.compile(r"Model loading took ([\d.]+) GiB(?: memory)? and ([\d.]+) seconds")
# "GPU KV cache size" in vLLM 0.26; the pool's device, and a host's part, since.
_CACHE = re.compile(r"KV cache size: ([\d,]+) tokens")


class ServerError(RuntimeError):
    """A server that does not start, or a benchmark process that ends before it is done.

    Attributes:
        reason: it in one line; `str` goes on with the end of the log.
    """

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(f"{reason}; the log ends:\n{tail(log)}" if log else reason)
        self.reason = reason

    @classmethod
    def of_log(cls, what: str, log: Path) -> "ServerError":
        """`what` went wrong with the process that has written the file `log`."""
        return cls(f"{what}; see {log}", log.read_text(errors="replace"))


@dataclass(frozen=True, kw_only=True)
class Startup:
    """What a server's log says about its memory.

    Attributes:
        weights_gib: of one rank, after loading; None where vLLM does not log it (CPU).
        load_s: seconds that loading took; on a CPU that reading took; None with neither.
        kv_tokens: that the KV cache holds.
    """

    weights_gib: float | None
    load_s: float | None
    kv_tokens: int

    @classmethod
    def of(cls, log: str) -> "Startup":
        """From the log of vLLM 0.26 to 0.32.

        Raises:
            ServerError: it does not say how large the KV cache is.
        """
        cache, weights = _CACHE.search(log), _WEIGHTS.search(log)
        loading = weights[2] if weights else (_READING.search(log) or [None, None])[1]
        if cache is None:
            raise ServerError("the log does not say how large the KV cache is", log)
        return cls(
            weights_gib=float(weights[1]) if weights else None,
            load_s=float(loading) if loading else None,
            kv_tokens=int(cache[1].replace(",", "")),
        )


class Server:
    """A running server; leaving its context ends it and every process that it started.

    Attributes:
        url: where it answers.
        startup: what its log said; set once it serves.
        start_s: seconds from its start until it answered /health.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        """Start Python with the arguments `command` and those of a free port; see `wait`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.started = time.monotonic()
        self._serves = False
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            self.process = start(
                [*command, "--host", "127.0.0.1", "--port", str(port)],
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        end(self.process, STOP_SECONDS if self._serves else ABANDON_SECONDS)

    def wait(self, seconds: float = START_SECONDS) -> None:
        """Return once it serves.

        Raises:
            ServerError: it ended, or `seconds` have passed; with the end of its log.
        """
        while not self._is_healthy():
            if self.process.poll() is not None:
                raise self._failure(f"the server ended with status {self.process.returncode}")
            if time.monotonic() - self.started > seconds:
                raise self._failure(f"the server was not up after {seconds:.0f} s")
            time.sleep(POLL_SECONDS)
        self._serves = True
        self.start_s = time.monotonic() - self.started
        self.startup = Startup.of(self.log.read_text(errors="replace"))

    def host_gib(self) -> float:
        """Largest resident set that a process of the server has had, in GiB.

        VmHWM of proc(5): pages of mapped files count, though the system may take them back.
        """
        process = psutil.Process(self.process.pid)
        family = (process, *process.children(recursive=True))
        return max(_peak_kib(member.pid) for member in family) / 2**20

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _failure(self, what: str) -> ServerError:
        return ServerError.of_log(what, self.log)


def _peak_kib(pid: int) -> int:
    with contextlib.suppress(FileNotFoundError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    # Gone, or a zombie.
    return 0
