"""A process is killed: the server says that it is unwell, ends with a line and leaves none behind.

systemd, Docker and Kubernetes start it anew for its exit status.
"""

import re
import signal
import threading
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from server_process import Server

from cast_serve.server.family import left_running

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama-2of4"


def start(log: Path, *flags: str) -> Server:
    server = Server(MODEL, log, "--served-model-name", "tiny", "--enforce-eager", *flags)
    server.wait_ready()
    return server


def engine_of(server: Server) -> psutil.Process:
    descendants = psutil.Process(server.process.pid).children(recursive=True)
    (engine,) = [p for p in descendants if "EngineCore" in " ".join(p.cmdline())]
    return engine


def status(server: Server) -> int | None:
    """What /health answers; None where nothing does."""
    try:
        return httpx.get(f"{server.url}/health", timeout=30).status_code
    except httpx.TransportError:
        return None


def assert_fails(server: Server, saying: str) -> None:
    assert server.process.wait(timeout=120) == 1
    assert re.search(f"^cast-serve: .*{saying}", server.log.read_text(), re.MULTILINE)


def test_idle(tmp_path):
    server = start(tmp_path / "log")
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert status(server) == 200
    engine_of(server).kill()
    seen = []
    while server.process.poll() is None:
        seen.append(status(server))
        time.sleep(0.05)
    # Once it has noticed it never again says that it is well.
    unwell = next(i for i, answer in enumerate(seen) if answer != 200)
    assert set(seen[unwell:]) <= {503, None}
    assert_fails(server, "the server ended by itself; the log above says why")
    # The engine's workers notice by themselves; a new server needs their memory.
    assert left_running(family, seconds=30) == []


def test_command_killed(tmp_path):
    """What it started does not stay behind it."""
    server = start(tmp_path / "log")
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert len(family) >= 2
    server.process.kill()
    assert left_running(family, seconds=30) == []


def test_server_killed(tmp_path):
    """As the kernel does where memory runs out: a new one finds the GPU free."""
    server = start(tmp_path / "log")
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert len(family) >= 3
    psutil.Process(server.process.pid).children()[0].kill()
    assert server.process.wait(timeout=30) == 128 + signal.SIGKILL
    assert "\ncast-serve: the server was ended by signal 9 (Killed);" in server.log.read_text()
    assert left_running(family, seconds=10) == []


@pytest.mark.parametrize(
    ("api_servers", "saying"), [("1", "ended by itself"), ("2", "died unexpectedly")]
)
def test_under_requests(tmp_path, api_servers, saying):
    """Every client is told, no stream looks as if it had come to its end, and none hangs."""
    server = start(tmp_path / "log", "--api-server-count", api_servers)
    engine = engine_of(server)
    begun = threading.Barrier(9)
    ends: list[Exception | None] = []

    def read() -> None:
        # Sixteen answers each: enough to do for the engine until it is killed.
        options = {"prompt": "it was", "n": 16, "max_tokens": 900, "stream": True}
        stream = server.client().completions.create(
            model="tiny", **options, extra_body={"ignore_eos": True}
        )
        next(stream)
        begun.wait(timeout=60)
        try:
            list(stream)
        except (openai.APIError, httpx.TransportError) as error:
            ends.append(error)
        else:
            ends.append(None)

    readers = [threading.Thread(target=read) for _ in range(8)]
    for reader in readers:
        reader.start()
    begun.wait(timeout=60)
    engine.kill()
    for reader in readers:
        reader.join(timeout=60)
    assert len(ends) == 8 and None not in ends
    assert_fails(server, saying)
