"""Bodies that are too large, with and without a header that says so."""

from argparse import Namespace
from collections.abc import Iterator

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from pydantic import BaseModel

from cast_serve.server.body_limit import LimitBody

LIMIT = 1000


class Prompt(BaseModel):
    prompt: str


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.state.args = Namespace(max_request_bytes=LIMIT)
    app.add_middleware(LimitBody)

    @app.post("/json")
    async def json(prompt: Prompt) -> int:
        return len(prompt.prompt)

    @app.post("/raw")
    async def raw(request: Request) -> int:
        return len(await request.body())

    return TestClient(app)


def chunks(size: int) -> Iterator[bytes]:
    """Sent without a Content-Length."""
    for start in range(0, size, 100):
        yield b"a" * min(100, size - start)


@pytest.mark.parametrize("size", [0, 1, LIMIT])
def test_passes_unchanged(client, size):
    assert client.post("/raw", content=b"a" * size).json() == size
    assert client.post("/raw", content=chunks(size)).json() == size


@pytest.mark.parametrize("size", [LIMIT + 1, 100 * LIMIT])
@pytest.mark.parametrize("path", ["/raw", "/json"])
@pytest.mark.parametrize("announced", [True, False])
def test_refused(client, path, size, announced):
    answer = client.post(path, content=b"a" * size if announced else chunks(size))
    assert answer.status_code == 413
    assert f"a request may send {LIMIT} bytes; see --max-request-bytes" in answer.text
