"""Ctrl-C and SIGTERM end the server cleanly: requests drained, no traceback, exit status 0."""

import os
import signal
import threading
from types import FrameType


def interrupt_only_this_process() -> None:
    """Make Ctrl-C stop the server as SIGTERM does. Call before any process or thread starts.

    A terminal sends SIGINT to every process of the group at once; vLLM's workers would die of it
    under the requests that the engine is still draining. They inherit the mask set here, and one
    thread of this process passes the signal on.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, _stop_starting)
    threading.Thread(target=_pass_on, daemon=True, name="interrupt").start()


def _stop_starting(number: int, frame: FrameType | None) -> None:
    # Once vLLM serves, it replaces this with its own handler, which drains.
    raise KeyboardInterrupt


def _pass_on() -> None:
    while True:
        signal.sigwait({signal.SIGINT})
        os.kill(os.getpid(), signal.SIGTERM)
