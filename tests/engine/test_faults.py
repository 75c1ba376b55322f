"""What a server must bear: clients without the key, hostile requests, clients that vanish, load."""

import asyncio
import concurrent.futures
import json
import os
import re
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from server_process import Server

# An engine start, and two more; minutes.
pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama-2of4"
SOAK = Path(__file__).parents[2] / "scripts" / "soak.py"
KEY = "sk-of-the-tests-86f1c0"
WRONG = "sk-that-is-wrong-5d20a7"
MIB = 2**20
GIB = 2**30
FLAGS = ("--served-model-name", "tiny", "--enforce-eager", "--kv-cache-memory-bytes", str(GIB // 4))
# The routes that probes, scrapers and browsers read without a key.
OPEN = {
    *("/health", "/ping", "/load", "/metrics", "/version"),
    *("/", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("faults") / "log"
    running = Server(MODEL, log, *FLAGS, "--api-key", KEY)
    running.wait_ready()
    yield running
    running.stop(signal.SIGTERM)


@pytest.fixture(scope="module")
def answer(server) -> str:
    """What the server says at first, and should at any time."""
    return ask(server)


@pytest.fixture(autouse=True)
def stays_well(server, answer) -> Iterator[None]:
    """After every test the server is healthy, idle, and answers as it did."""
    yield
    if server.process.poll() is not None:
        return
    assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
    assert ask(server) == answer
    end = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") and time.monotonic() < end:
        time.sleep(0.2)
    assert server.metric("vllm:num_requests_running") == 0


def body(**changes: object) -> dict[str, object]:
    return {"model": "tiny", "prompt": "it was", "max_tokens": 8, "temperature": 0, **changes}


def post(server: Server, path: str = "/v1/completions", **options: object) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    return httpx.post(server.url + path, headers=headers, timeout=120, **options)


def ask(server: Server) -> str:
    return post(server, json=body()).raise_for_status().json()["choices"][0]["text"]


def memory(server: Server) -> int:
    """Bytes that the server's processes hold."""
    root = psutil.Process(server.process.pid)
    return sum(p.memory_info().rss for p in [root, *root.children(recursive=True)])


def routes(server: Server) -> list[tuple[str, str]]:
    """Every route of the application and each of its methods, as vLLM logs them."""
    found = re.findall(r"Route: (\S+), Methods: (.+)$", server.log.read_text(), re.MULTILINE)
    return [(path, method) for path, methods in found for method in methods.strip().split(", ")]


@pytest.mark.parametrize(
    "sent",
    [None, f"Bearer {WRONG}", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"Basic {KEY}", KEY],
)
def test_routes_ask_for_the_key(server, sent):
    headers = {} if sent is None else {"Authorization": sent}
    asked = routes(server)
    assert ("/invocations", "POST") in asked and ("/v1/completions", "POST") in asked
    assert {path for path, _ in asked} >= OPEN
    for path, method in asked:
        url = server.url + re.sub(r"\{\w+\}", "x", path)
        status = httpx.request(method, url, headers=headers, timeout=30).status_code
        assert (status == 401) == (path not in OPEN), (path, method, status)


def test_the_key_opens_the_routes(server):
    for path, method in routes(server):
        url = server.url + re.sub(r"\{\w+\}", "x", path)
        headers = {"Authorization": f"Bearer {KEY}"}
        refused = httpx.request(method, url, headers=headers, content=b"[", timeout=30)
        assert refused.status_code != 401, (path, method)


def test_error_without_the_key(server):
    """As OpenAI words it, whichever layer refuses."""
    refused = httpx.post(f"{server.url}/v1/chat/completions", json={})
    assert refused.status_code == 401
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert refused.json()["error"]["code"] == "invalid_api_key"


def test_no_key_in_what_is_said(server):
    """After good and refused requests: in the log, in metrics, or on any route that can be read."""
    httpx.post(f"{server.url}/v1/completions", headers={"Authorization": f"Bearer {WRONG}"})
    post(server, content=b"{")
    headers = {"Authorization": f"Bearer {KEY}"}
    said = {
        path: httpx.get(server.url + path, headers=headers, timeout=30).text
        for path, method in routes(server)
        if method == "GET" and "{" not in path
    }
    assert "cast_serve_model_info" in said["/metrics"] and "tiny" in said["/v1/cast/info"]
    said["log"] = server.log.read_text()
    for where, text in said.items():
        assert KEY not in text and WRONG not in text, where


RAW = b'{"model": "tiny", "prompt": "%s", "max_tokens": 4}'
BAD: dict[str, Callable[[], dict[str, object]]] = {
    "stop-1e6": lambda: {"json": body(stop=[f"s{i}" for i in range(10**6)])},
    "stop-ids-1e6": lambda: {"json": body(stop_token_ids=list(range(10**6)))},
    "bias-1e5": lambda: {"json": body(logit_bias={str(i): 1 for i in range(10**5)})},
    "bad-words-1e5": lambda: {"json": body(bad_words=[f"w{i}" for i in range(10**5)])},
    "max-tokens": lambda: {"json": body(max_tokens=10**12)},
    "max-tokens-2e70": lambda: {"json": body(max_tokens=2**70)},
    "max-tokens-negative": lambda: {"json": body(max_tokens=-1)},
    "n-1e6": lambda: {"json": body(n=10**6, temperature=1)},
    "logprobs": lambda: {"json": body(logprobs=10**9)},
    "seed": lambda: {"json": body(seed=2**80)},
    "temperature": lambda: {"json": body(temperature=1e308)},
    "nan": lambda: {"content": b'{"model": "tiny", "prompt": "a", "temperature": NaN}'},
    "prompt-10-mb": lambda: {"json": body(prompt="word " * 2_000_000)},
    "prompts-1e5": lambda: {"json": body(prompt=["a"] * 10**5)},
    "ids-1e6": lambda: {"json": body(prompt=[5] * 10**6)},
    "id-too-large": lambda: {"json": body(prompt=[2**70])},
    "id-negative": lambda: {"json": body(prompt=[-1])},
    "invalid-utf-8": lambda: {"content": RAW % b"\xff\xfe"},
    "half-a-character": lambda: {"content": RAW % rb"\ud800"},
    "brackets-1e6": lambda: {"content": b"[" * 10**6},
    "half-json": lambda: {"content": b'{"model": "tiny", "pro'},
    "schema-deep": lambda: {"json": body(structured_outputs={"json": nested(300)})},
    "regex-broken": lambda: {"json": body(structured_outputs={"regex": "((("})},
    "no-body": lambda: {"content": b""},
}


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize("name", BAD)
def test_refused(server, name):
    refused = post(server, **BAD[name]())
    assert refused.status_code in (400, 413, 422), refused.text[:500]
    assert refused.json()


def head(server: Server, *fields: str) -> bytes:
    lines = (
        "POST /v1/completions HTTP/1.1",
        f"Host: 127.0.0.1:{server.port}",
        f"Authorization: Bearer {KEY}",
        "Content-Type: application/json",
        *fields,
    )
    return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n"


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=60)


@pytest.mark.parametrize("announced", [True, False])
def test_body_of_a_gigabyte(server, announced):
    peak = peak_memory(server)
    with connect(server) as client:
        length = f"Content-Length: {GIB}" if announced else "Transfer-Encoding: chunked"
        client.sendall(head(server, length))
        piece = b"a" * MIB if announced else b"%x\r\n%s\r\n" % (MIB, b"a" * MIB)
        for _ in range(GIB // MIB):
            client.sendall(piece)
        if not announced:
            client.sendall(b"0\r\n\r\n")
        reply = client.recv(65536)
    assert reply.startswith(b"HTTP/1.1 413 ")
    assert b"a request may send 67108864 bytes; see --max-request-bytes" in reply
    # At most twice the limit: its pieces, and they joined.
    assert peak_memory(server) - peak < 192 * MIB


def peak_memory(server: Server) -> int:
    """The largest resident set that the process with the API has had, in bytes."""
    (api,) = psutil.Process(server.process.pid).children()
    status = Path(f"/proc/{api.pid}/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1]) * 1024


def vanish(client: socket.socket) -> None:
    """Close as a machine does that loses its power: by a reset, without a word."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def send_parts(server: Server) -> None:
    """Vanish at every stage of a request and its answer."""
    request = json.dumps(body(max_tokens=900, stream=True, ignore_eos=True)).encode()
    whole = head(server, f"Content-Length: {len(request)}") + request
    for size in (0, 1, 20, len(whole) // 2, len(whole) - 1, len(whole)):
        client = connect(server)
        client.sendall(whole[:size])
        vanish(client)
    client = connect(server)
    client.sendall(whole)
    assert client.recv(100).startswith(b"HTTP/1.1 200")
    vanish(client)


def test_clients_that_vanish(server):
    for _ in range(30):
        send_parts(server)
    before = memory(server)
    for _ in range(90):
        send_parts(server)
    assert memory(server) - before < 64 * MIB


def test_half_requests_that_stay(server, answer):
    """They hold connections, and nothing else."""
    request = json.dumps(body()).encode()
    whole = head(server, f"Content-Length: {len(request)}") + request
    before = memory(server)
    halves = [connect(server) for _ in range(300)]
    for number, client in enumerate(halves):
        client.sendall(whole[: -1 - number % len(whole)])
    assert ask(server) == answer
    assert memory(server) - before < 64 * MIB
    # What each of them sent was kept for it.
    halves[0].sendall(whole[-1:])
    assert halves[0].recv(100).startswith(b"HTTP/1.1 200")
    for client in halves:
        client.close()


def soak(server: Server, *flags: str) -> tuple[int, dict[str, float]]:
    """Exit status and report of scripts/soak.py for some seconds."""
    small = ("--url", server.url, "--streams", "16", "--seconds", "5", "--prompts", "12")
    done = subprocess.run(
        [sys.executable, SOAK, *small, "--abandon", "0.5", *flags],
        env={**os.environ, "VLLM_API_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_streams_get_what_they_get_alone(server):
    status, report = soak(server, "--pid", str(server.process.pid))
    assert status == 0, report
    assert report["answers"] >= 16 and report["abandoned"] > 0
    assert report["wrong_or_lost"] == report["left_in_server"] == 0
    assert report["mib_end"] > 100


def test_soak_sees_another_s_answer(server):
    """Its judgement of an answer that differs: one that belongs to another prompt is far off."""
    program = runpy.run_path(str(SOAK))

    async def furthest() -> tuple[float, float]:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=60) as client:
            mine, other = program["questions"](2, seed=0)
            tokens = await program["alone"](client, mine, "tiny")
            judge = program["distance"]
            return (
                await judge(client, mine, tokens, "tiny"),
                await judge(client, other, tokens, "tiny"),
            )

    own, others = asyncio.run(furthest())
    assert own < 0.1 < others


def test_second_server_on_this_host(server, answer, tmp_path):
    """It has ports of its own, also those that nobody sees, and ends without the first."""
    second = Server(MODEL, tmp_path / "log", *FLAGS)
    second.wait_ready()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(ask, [server, second] * 16))
    assert set(texts) == {answer}
    assert second.stop(signal.SIGTERM) == 0


def test_sigterm_under_load(server):
    """The last test of this file: 64 streams that the server has begun all come to their end."""
    begun = threading.Barrier(65)
    ends: list[str] = []

    def read() -> None:
        stream = server.client(KEY).completions.create(
            **body(max_tokens=100, stream=True), extra_body={"ignore_eos": True}
        )
        first = next(stream)
        begun.wait(timeout=120)
        ends.append([first, *stream][-1].choices[0].finish_reason)

    readers = [threading.Thread(target=read) for _ in range(64)]
    for reader in readers:
        reader.start()
    begun.wait(timeout=120)
    assert server.stop(signal.SIGTERM) == 0
    for reader in readers:
        reader.join(timeout=60)
    assert ends == ["length"] * 64
    assert "Traceback" not in server.log.read_text()
