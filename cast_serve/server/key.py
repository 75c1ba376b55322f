"""The API key on every route, but the few that probes, scrapers and browsers read.

vLLM asks for it below /v1, /v2 and /inference alone: /invocations, which generates as
/v1/completions does, /tokenize and /generative_scoring would answer anybody.
"""

import hashlib
import os
import secrets
from argparse import Namespace
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from cast_serve.server.errors import refusal

OPEN = frozenset(
    {
        *("/health", "/ping", "/load", "/metrics", "/version"),
        *("/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"),
        # The page; what it asks below /v1 needs the key.
        "/",
    }
)
OPEN_BELOW = ("/ui/", "/static/")


def keys_of(args: Namespace) -> list[str]:
    """The keys that vLLM takes: those of --api-key, else that of VLLM_API_KEY."""
    given = args.api_key or [os.environ.get("VLLM_API_KEY")]
    return [key for key in given if key]


class RequireKey:
    """ASGI middleware that answers 401 to a request without a key of the server, if it has any.

    Also where there is no route: who has no key does not learn which there are.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and not _may_pass(scope):
            await _refusal()(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def path_of(scope: Scope) -> str:
    """The path that is asked for, below --root-path."""
    return str(scope["path"]).removeprefix(scope.get("root_path", "").rstrip("/"))


def _may_pass(scope: Scope) -> bool:
    keys = keys_of(scope["app"].state.args)
    # A browser asks by OPTIONS, which it sends no key with, whether it may send one.
    if not keys or scope.get("method") == "OPTIONS":
        return True
    path = path_of(scope)
    if path in OPEN or path.startswith(OPEN_BELOW):
        return True
    scheme, _, given = Headers(scope=scope).get("Authorization", "").partition(" ")
    # Digests of one length, every one compared in full: the time tells nothing of a key.
    matches = [secrets.compare_digest(_digest(given), _digest(key)) for key in keys]
    return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _refusal() -> JSONResponse:
    answer = refusal(
        HTTPStatus.UNAUTHORIZED,
        "wrong API key, or none; send it as `Authorization: Bearer KEY`",
        type="invalid_request_error",
        code="invalid_api_key",
    )
    answer.headers["WWW-Authenticate"] = "Bearer"
    return answer
