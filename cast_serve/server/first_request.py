"""Lets a connection that was opened just before the server closes make its request.

uvicorn, when it stops, closes every connection that it owes no answer. One whose request is still
on its way would see it close without a word, which many clients do not try again. Idle ones that
have had an answer are closed as ever: of those clients expect it.
"""

import asyncio

# From the close of the server. Less than the second that it gives its last words at least.
SECONDS = 0.5


def wait_for_first_request(protocol: type[asyncio.Protocol]) -> type[asyncio.Protocol]:
    """uvicorn's protocol of one connection (httptools or h11), which waits before it closes."""

    class WaitsForFirstRequest(protocol):  # type: ignore[misc, valid-type]
        def shutdown(self) -> None:
            # The cycle is of the latest request; None before the first.
            if self.cycle is None:
                self.loop.call_later(SECONDS, super().shutdown)
            else:
                super().shutdown()

    return WaitsForFirstRequest
