"""SIGTERM to an API server: one without an engine, in this process."""

import argparse
import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

from cast_serve.server.drain import REASON, Drain
from cast_serve.server.errors import OpenAIErrors

EVENTS = 10


class Server(uvicorn.Server):
    """Leaves signals to others, as vLLM's does."""

    serving: asyncio.Task[None]

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def application(timeout: float) -> FastAPI:
    app = FastAPI()
    app.state.args = argparse.Namespace(shutdown_timeout=timeout)
    # As vLLM adds those of --middleware: the last one is the first to see a request.
    app.add_middleware(Drain)
    app.add_middleware(OpenAIErrors)

    @app.exception_handler(HTTPException)
    async def worded(request: Request, failure: HTTPException) -> JSONResponse:
        """In the form of vLLM's own."""
        error = {"message": failure.detail, "code": failure.status_code}
        return JSONResponse({"error": error}, failure.status_code)

    async def events() -> AsyncIterator[str]:
        for number in range(EVENTS):
            yield f"data: {number}\n\n"
            await asyncio.sleep(0.1)

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(events(), media_type="text/event-stream")

    async def flood() -> AsyncIterator[bytes]:
        while True:
            yield bytes(2**20)

    @app.get("/flood")
    async def more_than_a_socket_holds() -> StreamingResponse:
        return StreamingResponse(flood(), media_type="text/event-stream")

    @app.get("/health")
    async def health() -> None: ...

    @app.get("/metrics")
    async def metrics() -> str:
        return "requests 1"

    @app.get("/slow")
    async def slow() -> dict[str, str]:
        await asyncio.sleep(EVENTS * 0.1)
        return {"said": "all"}

    return app


Scenario = Callable[[httpx.AsyncClient, Server], Awaitable[None]]


def run(scenario: Scenario, *, timeout: float = 60, knows_server: bool = True) -> list[int]:
    """Serve as vLLM does while the scenario runs; the signals that have come to vLLM's handler."""
    heard: list[int] = []

    async def serve() -> None:
        app = application(timeout)
        server = Server(uvicorn.Config(app, port=0, log_level="warning"))
        if knows_server:
            app.state.server = server
        server.serving = asyncio.create_task(server.serve())
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, heard.append, signal.SIGTERM)
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            await scenario(client, server)
        server.should_exit = True
        await asyncio.wait_for(server.serving, 20)

    asyncio.run(serve())
    return heard


async def begin(client: httpx.AsyncClient, path: str) -> asyncio.Task[httpx.Response]:
    asked = asyncio.create_task(client.get(path))
    await asyncio.sleep(0.3)
    return asked


async def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.1)


def test_what_is_in_flight_ends_and_what_is_new_is_refused():
    async def scenario(client: httpx.AsyncClient, server: Server) -> None:
        stream, slow = await begin(client, "/stream"), await begin(client, "/slow")
        await terminate()
        late = await client.get("/slow")
        assert late.status_code == 503
        assert late.json()["error"]["message"] == REASON
        assert (await stream).text.count("data: ") == EVENTS
        assert (await slow).json() == {"said": "all"}
        await asyncio.wait_for(server.serving, 10)

    assert run(scenario) == []


def test_who_watches_sees_it_drain():
    async def scenario(client: httpx.AsyncClient, server: Server) -> None:
        stream = await begin(client, "/stream")
        await terminate()
        assert (await client.get("/metrics")).json() == "requests 1"
        assert (await client.get("/health")).status_code == 503
        assert (await stream).text.count("data: ") == EVENTS

    run(scenario)


def test_idle_server_ends_at_once():
    async def scenario(client: httpx.AsyncClient, server: Server) -> None:
        await client.get("/stream")
        await terminate()
        await asyncio.wait_for(server.serving, 5)

    assert run(scenario) == []


@pytest.mark.parametrize("asks", [True, False])
def test_connection_that_is_younger_than_its_request(asks):
    """Opened before the server closes, it is answered after; silent, it holds nothing."""

    async def scenario(client: httpx.AsyncClient, server: Server) -> None:
        port = client.base_url.port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await terminate()
        while server.servers[0].is_serving():
            await asyncio.sleep(0.01)
        if asks:
            writer.write(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 5)
        assert (b" 503 " in answer.splitlines()[0]) if asks else answer == b""
        writer.close()
        await asyncio.wait_for(server.serving, 5)

    assert run(scenario) == []


def test_what_does_not_end_in_time_is_told(caplog, capfd):
    """To its client, and in one line of the log."""

    async def scenario(client: httpx.AsyncClient, server: Server) -> None:
        stream, slow = await begin(client, "/stream"), await begin(client, "/slow")
        await terminate()
        *_, said = (await stream).text.strip().split("\n\n")
        kind, data = said.splitlines()
        assert kind == "event: error"
        assert json.loads(data.removeprefix("data: "))["error"]["message"] == REASON
        assert (await slow).status_code == 503
        await asyncio.wait_for(server.serving, 10)

    assert run(scenario, timeout=0.2) == []
    assert "2 requests were broken off; --shutdown-timeout gives them longer" in caplog.text
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("engine_died", [False, True])
def test_client_that_does_not_read_holds_nothing(engine_died, capfd):
    async def scenario(client: httpx.AsyncClient, server: Server) -> None:
        async with client.stream("GET", "/flood"):
            if engine_died:
                server.should_exit = True
            else:
                await terminate()
            await asyncio.wait_for(server.serving, 10)

    assert run(scenario, timeout=0.2) == []
    said = capfd.readouterr().err
    assert "Cancel 1 running task(s), timeout graceful shutdown exceeded" in said
    assert "Traceback" not in said


def test_vllm_that_does_not_show_its_server(caplog):
    """It drains in its own way, and the log says so."""

    async def scenario(client: httpx.AsyncClient, server: Server) -> None:
        stream = await begin(client, "/stream")
        await terminate()
        assert (await client.get("/slow")).status_code == 200
        assert (await stream).text.count("data: ") == EVENTS
        assert not server.serving.done()

    assert run(scenario, knows_server=False) == [signal.SIGTERM]
    assert "drains in its own way" in caplog.text
