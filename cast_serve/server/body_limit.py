"""How much a request may send: vLLM and uvicorn take any body, and hold it in memory whole."""

from http import HTTPStatus

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cast_serve.server.errors import refusal

# A prompt of a million token ids is 7 MB of JSON; the rest is room for pictures.
MAX_REQUEST_BYTES = 64 * 2**20

TOO_LARGE = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class LimitBody:
    """ASGI middleware that answers 413 to a body of more than --max-request-bytes.

    At once where the header says so, else when that much has come. What still comes is thrown away
    by uvicorn, so a client that sends everything before it reads gets the answer too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit: int = scope["app"].state.args.max_request_bytes
        if int(Headers(scope=scope).get("Content-Length", "0")) > limit:
            await refusal(TOO_LARGE, _reason(limit))(scope, receive, send)
            return
        received = 0

        async def count() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                # Through the application, whose handlers word it as any other error.
                raise HTTPException(TOO_LARGE, _reason(limit))
            return message

        await self.app(scope, count, send)


def _reason(limit: int) -> str:
    return f"a request may send {limit} bytes; see --max-request-bytes"
