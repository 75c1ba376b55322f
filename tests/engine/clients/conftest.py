"""One server of the example model, with an API key, for all clients."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from asking import MODEL
from openai import OpenAI
from server_process import Server

EXAMPLE = Path(__file__).parents[3] / "examples" / "tiny-llama-2of4"
KEY = "a key of this test"


@pytest.fixture(scope="package")
def server(tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("clients") / "server"
    flags = (
        *("--served-model-name", MODEL, "--enforce-eager", "--kv-cache-memory-bytes", "256M"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    )
    running = Server(EXAMPLE, log, *flags, environment={"VLLM_API_KEY": KEY})
    running.wait_ready()
    yield running
    running.stop(signal.SIGTERM)


@pytest.fixture(scope="package")
def client(server) -> OpenAI:
    # No tries beyond the first: they would hide a failure.
    return OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120)


@pytest.fixture
def metric(server) -> Callable[..., float]:
    return server.metric


@pytest.fixture
def wait_until_running(metric) -> Callable[[int], None]:
    """Waits until the engine runs so many requests, with none waiting."""

    def wait(requests: int) -> None:
        end = time.monotonic() + 60
        wanted = (requests, 0)
        while (
            now := (metric("vllm:num_requests_running"), metric("vllm:num_requests_waiting"))
        ) != wanted:
            assert time.monotonic() < end, f"{now} requests run and wait, not {wanted}"
            time.sleep(0.1)

    return wait
