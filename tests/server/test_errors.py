"""Errors that vLLM does not word as OpenAI's API does, on an app that fails in those ways."""

import json
import logging

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from vllm.renderers import chat_utils

from cast_serve.server.errors import OpenAIErrors

READ = """
def read(content):
    return content[0]
"""


class Refused(Exception):
    pass


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    app.add_middleware(OpenAIErrors)

    @app.exception_handler(Refused)
    async def refused(request, failure):
        error = {"message": str(failure), "type": "BadRequestError", "param": None, "code": 400}
        return JSONResponse({"error": error}, 400)

    @app.get("/json/{status}")
    async def answer(status: int, body: str):
        return JSONResponse(json.loads(body), status)

    @app.get("/stream")
    async def stream(failure: str):
        async def events():
            yield "data: {}\n\n"
            raise {"refused": Refused("empty prompt"), "broken": OSError("disk")}[failure]

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.get("/read")
    async def read():
        # A function of vLLM's module, as far as its traceback says.
        there = {"__name__": chat_utils.__name__}
        exec(READ, there)
        return there["read"]([])

    @app.get("/run")
    async def run():
        return [][0]

    return TestClient(app, raise_server_exceptions=False)


def asked(client: TestClient, status: int, body: object) -> httpx.Response:
    return client.get(f"/json/{status}", params={"body": json.dumps(body)})


def test_answers_pass_as_they_are(client):
    assert asked(client, 200, {"error": "Unauthorized"}).json() == {"error": "Unauthorized"}


def test_errors_of_openai_s_form_pass_as_they_are(client):
    body = {"error": {"message": "m", "type": "t", "param": "n", "code": 400}}
    answer = asked(client, 400, body)
    assert (answer.status_code, answer.json()) == (400, body)


@pytest.mark.parametrize("method, path, status", [("GET", "/no", 404), ("PUT", "/read", 405)])
def test_no_such_route(client, method, path, status):
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == status
    assert answer.headers["content-length"] == str(len(answer.content))


def test_allowed_methods_are_kept(client):
    assert client.put("/read").headers["allow"] == "GET"


@pytest.mark.parametrize("body", [[], "x", None, {"error": None}, {"detail": {"a": 1}}])
def test_any_other_body(client, body):
    error = asked(client, 503, body).json()["error"]
    assert error["code"] == 503
    assert error["message"]


def test_status_that_is_not_registered(client):
    answer = asked(client, 499, {"detail": "gone"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (499, "gone")
    assert asked(client, 499, []).json()["error"]["message"] == "Error"


def test_not_implemented_is_not_found(client):
    error = {"message": "no such API", "type": "NotImplementedError", "param": None, "code": 501}
    answer = asked(client, 501, {"error": error})
    assert answer.status_code == 404
    assert answer.json()["error"] == {**error, "type": "NotFoundError", "code": 404}


@pytest.mark.parametrize(
    "failure, said",
    [("refused", ("empty prompt", 400)), ("broken", ("the answer was broken off", 500))],
)
def test_stream_that_fails_ends_with_the_error(client, failure, said):
    text = client.get("/stream", params={"failure": failure}).text
    first, last = text.strip().split("\n\n")
    assert first == "data: {}"
    event, data = last.split("\n")
    assert event == "event: error"
    error = json.loads(data.removeprefix("data: "))["error"]
    assert error["message"].startswith(said[0])
    assert error["code"] == said[1]


def test_request_that_cannot_be_read(client, caplog):
    with caplog.at_level(logging.WARNING):
        answer = client.get("/read")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        "the request cannot be read: IndexError: list index out of range"
    )
    assert [record.getMessage() for record in caplog.records if "vLLM" in record.msg] == [
        "/read: vLLM tripped over a request at <string>:3"
    ]


def test_fault_of_the_server_stays_one(client):
    assert client.get("/run").status_code == 500
