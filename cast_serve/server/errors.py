"""Makes every failure an error that OpenAI's clients can read: {"error": {"message", ...}}.

vLLM answers most failures so. `OpenAIErrors` goes around its whole API server, by --middleware,
and puts right the others:

- an unknown path (404) or method (405), whose bodies are of other forms;
- what this model or version has no implementation of (501): OpenAI's API says 404, and clients and
  proxies try a 5xx again;
- a request that vLLM trips over while it reads it, such as an empty list whose first item it takes
  (500);
- a stream that fails after its first events, which vLLM breaks off in the middle of HTTP's framing:
  clients see a broken connection and not why.
"""

import json
import logging
import traceback
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from http.client import responses
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

# What code that trusts its input raises; vLLM itself answers ValueError and TypeError with 400.
TRIPS = (AssertionError, AttributeError, LookupError)
# Where vLLM makes a prompt of a request. Nothing of the engine runs below it.
READING = "vllm.renderers."

TYPES = {404: "NotFoundError"}


def refusal(status: HTTPStatus, message: str, **fields: str) -> JSONResponse:
    """A middleware's answer to a request that it does not let pass; `fields` as OpenAI's are."""
    return JSONResponse({"error": {**_error(status, message), **fields}}, status)


class OpenAIErrors:
    """ASGI middleware; see the module."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        answer = _Answer(send)
        try:
            await self.app(scope, receive, answer.send)
        except Exception as failure:
            if answer.is_open_stream:
                await answer.end(await _reason(scope, failure))
                if isinstance(failure, HTTPException):
                    # A middleware's own word (drain.py) and no fault; its log line is enough.
                    return
            elif not answer.begun and _is_of_reading(failure):
                # A line, not its traceback: whoever sends such requests would fill the log.
                frame = traceback.extract_tb(failure.__traceback__)[-1]
                where = f"{frame.filename}:{frame.lineno}"
                logger.warning("%s: vLLM tripped over a request at %s", scope["path"], where)
                answer_instead = refusal(
                    HTTPStatus.BAD_REQUEST,
                    f"the request cannot be read: {type(failure).__name__}: {failure}",
                )
                return await answer_instead(scope, receive, send)
            # uvicorn logs it.
            raise


class _Answer:
    """Passes an answer on; holds one that failed until its body is whole."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._held: Message | None = None
        self._body = b""
        self.begun = False
        self.is_open_stream = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            kind = MutableHeaders(raw=message["headers"]).get("content-type", "")
            self.is_open_stream = kind.startswith("text/event-stream")
            if message["status"] >= 400 and kind.startswith("application/json"):
                self._held = message
                return
        elif self._held is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_error(self._held)
            return
        elif not message.get("more_body", False):
            self.is_open_stream = False
        await self._send(message)

    async def _send_error(self, start: Message) -> None:
        status, body = _worded(start["status"], self._body)
        headers = MutableHeaders(raw=list(start["headers"]))
        headers["content-length"] = str(len(body))
        await self._send({**start, "status": status, "headers": headers.raw})
        await self._send({"type": "http.response.body", "body": body})

    async def end(self, error: dict[str, Any]) -> None:
        """End the stream with the event that OpenAI's and Anthropic's clients raise as an error."""
        event = f"event: error\ndata: {json.dumps({'type': 'error', 'error': error})}\n\n"
        await self._send({"type": "http.response.body", "body": event.encode()})


def _worded(status: int, body: bytes) -> tuple[int, bytes]:
    """Status and body of an error as OpenAI's API would have them."""
    try:
        said = json.loads(body)
    except ValueError:
        said = None
    error = said.get("error") if isinstance(said, dict) else None
    if isinstance(error, dict) and status != HTTPStatus.NOT_IMPLEMENTED:
        return status, body
    if status == HTTPStatus.NOT_IMPLEMENTED:
        status = HTTPStatus.NOT_FOUND
    if isinstance(error, dict):
        message = error.get("message", "")
    else:
        detail = said.get("detail") if isinstance(said, dict) else None
        message = str(error or detail or _phrase(status))
    return status, json.dumps({"error": _error(status, message)}).encode()


def _phrase(status: int) -> str:
    """Also of one that is not registered, as a middleware of the user may answer with."""
    return responses.get(status, "Error")


def _error(status: int, message: str) -> dict[str, Any]:
    """As vLLM's ErrorInfo."""
    kind = TYPES.get(status) or _phrase(status)
    return {"message": message, "type": kind, "param": None, "code": int(status)}


def _is_of_reading(failure: Exception) -> bool:
    """Whether vLLM tripped over the request itself, before the engine had it."""
    frames = (frame for frame, _ in traceback.walk_tb(failure.__traceback__))
    return isinstance(failure, TRIPS) and any(
        frame.f_globals.get("__name__", "").startswith(READING) for frame in frames
    )


async def _reason(scope: Scope, failure: Exception) -> dict[str, Any]:
    """The error that vLLM would have answered with, had the stream not begun."""
    # Starlette raises RuntimeError from what it would have handled.
    cause = failure.__cause__ if isinstance(failure.__cause__, Exception) else failure
    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Any]]]
    handlers = scope["app"].exception_handlers
    handler = next((handlers[kind] for kind in type(cause).__mro__ if kind in handlers), None)
    if handler is None:
        return _error(500, "the answer was broken off; the server's log says why")
    response = await handler(Request(scope), cause)
    error: dict[str, Any] = json.loads(response.body)["error"]
    return error
