"""The API key: which routes ask for it, and what counts as one."""

from argparse import Namespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from cast_serve.server.key import RequireKey, keys_of

KEYS = ["first-key", "second-key"]


@pytest.fixture(scope="module")
def client() -> TestClient:
    return serving(KEYS)


def serving(keys: list[str] | None, root_path: str = "/behind") -> TestClient:
    app = FastAPI(root_path=root_path)
    app.state.args = Namespace(api_key=keys)
    app.add_middleware(RequireKey)

    @app.api_route("/{path:path}", methods=["GET", "POST", "OPTIONS"])
    async def anything(path: str) -> str:
        return path

    @app.websocket("/v1/realtime")
    async def realtime(socket):
        await socket.accept()

    return TestClient(app)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_a_key_opens(client, key, scheme):
    assert client.get("/v1/models", headers={"Authorization": f"{scheme} {key}"}).is_success


@pytest.mark.parametrize(
    "sent",
    [
        *("", "Bearer", "Bearer ", "first-key", "Basic first-key", "Bearer first-ke"),
        *(
            "Bearer first-key ",
            "Bearer  first-key",
            "Bearer first-key,second-key",
            "Bearer FIRST-KEY",
        ),
        "Bearer \xe9",
    ],
)
def test_nothing_else_does(client, sent):
    answer = client.get("/v1/models", headers=[(b"Authorization", sent.encode("latin-1"))])
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "path",
    [
        *("/v1", "/v1/chat/completions", "/invocations", "/tokenize", "/scale_elastic_ep", "/new"),
        *("/health/", "/HEALTH", "/ui", "/behind", "/behind/v1/models", "/metrics.old"),
    ],
)
def test_closed(client, path):
    assert client.get(path).status_code == 401
    assert client.post(path).status_code == 401


@pytest.mark.parametrize(
    "path", ["/", "/health", "/ping", "/metrics", "/ui/app.js", "/behind/health"]
)
def test_open(client, path):
    assert client.get(path).is_success


def test_root_path_that_ends_in_a_slash():
    client = serving(KEYS, "/behind/")
    assert client.get("/behind/health").is_success
    assert client.get("/behind/v1/models").status_code == 401


def test_without_a_key_all_is_open(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert serving(None).post("/v1/completions").is_success


def test_preflight(client):
    assert client.options("/v1/models").is_success


def test_websocket(client):
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/realtime"):
        pass


def test_keys(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert keys_of(Namespace(api_key=None)) == []
    monkeypatch.setenv("VLLM_API_KEY", "of the environment")
    assert keys_of(Namespace(api_key=None)) == ["of the environment"]
    assert keys_of(Namespace(api_key=["a", "", "b"])) == ["a", "b"]
