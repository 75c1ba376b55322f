"""Lets the streams of an API server come to their end on SIGTERM.

vLLM drains through the engine's process and closes its connection to it when that has ended.
Streams that lag behind the engine by then, or whose engine was killed at the end of
--shutdown-timeout, get neither their rest nor an error, and uvicorn waits for them without end. Of
several API servers (--api-server-count, --data-parallel-size) each even closes its connection at
once. So an API server refuses what is new and ends only after what it has begun; vLLM stops the
engine, which is idle, afterwards.
"""

import asyncio
import logging
import math
import signal
from http import HTTPStatus

from fastapi import FastAPI, HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cast_serve.server.errors import refusal
from cast_serve.server.first_request import wait_for_first_request
from cast_serve.server.key import path_of
from cast_serve.server.shutdown import quiet_broken_off

logger = logging.getLogger(__name__)

# Of --shutdown-timeout, after which vLLM kills one of several; the rest is for the last words.
SHARE = 0.9

# Read every few seconds by Prometheus and by every open page. Answered to the end: a scrape that
# fails is an alarm. /health says 503, as to a load balancer.
WATCHED = "/metrics"

REASON = "the server is being stopped; send the request again, to another or to its successor"


class Drain:
    """ASGI middleware; see the module."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._is_armed = False
        self._is_stopping = False
        # Of each request in flight.
        self._limits: set[asyncio.Timeout] = set()
        self._broken_off = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            # Started by uvicorn, and so after vLLM has set up its handlers of signals.
            self._arm(scope["app"])
        if scope["type"] == "lifespan" or not self._is_armed:
            await self.app(scope, receive, send)
        elif self._is_stopping:
            # Not among those that it waits for.
            answer = self.app if path_of(scope) == WATCHED else _refusal()
            await answer(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    def _arm(self, app: FastAPI) -> None:
        if not hasattr(app.state, "server"):
            logger.warning(
                "this version of vLLM drains in its own way: SIGTERM may break off streams, and "
                "does with --api-server-count above 1"
            )
            return
        self._is_armed = True
        quiet_broken_off()
        # A client that does not read would hold its connection, and with it a server that stops,
        # also one whose engine has died. Half of the rest: with all of it vLLM would kill first.
        last_words = math.ceil((1 - SHARE) / 2 * app.state.args.shutdown_timeout)
        config = app.state.server.config
        config.timeout_graceful_shutdown = max(1, last_words)
        # Before the first connection: the server listens once its lifespan has begun.
        config.http_protocol_class = wait_for_first_request(config.http_protocol_class)
        # In the place of vLLM's handler, which stops the engine or leaves it.
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop, app)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def note(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            async with asyncio.timeout(None) as limit:
                self._limits.add(limit)
                try:
                    await self.app(scope, receive, note)
                finally:
                    self._limits.discard(limit)
        except TimeoutError:
            if not limit.expired():
                raise
            self._broken_off += 1
            if has_begun:
                # errors.py makes it the last event of the stream.
                raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, REASON) from None
            await _refusal()(scope, receive, send)

    def _stop(self, app: FastAPI) -> None:
        if self._is_stopping:
            return
        self._is_stopping = True
        seconds = SHARE * app.state.args.shutdown_timeout
        logger.info("%d requests in flight get %.0f s to end", len(self._limits), seconds)
        loop = asyncio.get_running_loop()
        for limit in self._limits:
            limit.reschedule(loop.time() + seconds)
        # Kept: the loop itself would let it be collected.
        self._ending = loop.create_task(self._end(app))

    async def _end(self, app: FastAPI) -> None:
        while self._limits:
            await asyncio.sleep(0.1)
        if self._broken_off:
            logger.warning(
                "%d requests were broken off; --shutdown-timeout gives them longer",
                self._broken_off,
            )
        # uvicorn's own way to stop, and vLLM's where an engine has died.
        app.state.server.should_exit = True


def _refusal() -> JSONResponse:
    answer = refusal(HTTPStatus.SERVICE_UNAVAILABLE, REASON)
    answer.headers["Connection"] = "close"
    return answer
