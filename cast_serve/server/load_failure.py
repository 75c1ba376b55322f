"""Whether an engine failed on the weights of its model, told by the process that loads them.

The server's own process only learns that an engine has not started, be it for want of memory or
for a damaged checkpoint. A worker, or an engine without workers, logs why, with a traceback that
says where; a filter on its logger tells serve.py, whose socket it finds by the environment.
"""

import contextlib
import logging
import os
import socket
import traceback

from torch import AcceleratorError, OutOfMemoryError

# The name, in Linux's abstract namespace, of the socket on which serve.py listens.
SOCKET = "CAST_SERVE_LOAD_FAILURE"

# Bytes of what is told.
LONGEST = 2000

# Those of vLLM's processes that load.
LOGGERS = ("vllm.v1.executor.multiproc_executor", "vllm.v1.engine.core")

# What vLLM's loaders call, and the models and layers below them.
LOADING = frozenset({"load_weights", "process_weights_after_loading"})


def listen() -> socket.socket:
    """The socket for `heard`. Before the engine's processes are started, which inherit its name."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.setblocking(False)
    # Linux chooses a name: unix(7), autobind. It leaves no file behind a process that is killed.
    listening.bind("")
    os.environ[SOCKET] = listening.getsockname()[1:].decode()
    return listening


def heard(listening: socket.socket) -> str | None:
    """What the first process to fail on the weights since `listen` has said; None if none did."""
    try:
        return listening.recv(LONGEST).decode(errors="replace")
    except BlockingIOError:
        return None


def tell_of_failures() -> None:
    """Tell serve.py, should this process fail on the weights; does nothing under `vllm serve`."""
    if name := os.environ.get(SOCKET):
        for logger in LOGGERS:
            logging.getLogger(logger).addFilter(_Teller(name))


class _Teller(logging.Filter):
    """Lets every record pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        failure = record.exc_info[1] if record.exc_info else None
        if failure is not None and _is_of_weights(failure):
            # serve.py may be gone; what is being logged matters more.
            with (
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as teller,
                contextlib.suppress(OSError),
            ):
                teller.setblocking(False)
                said = " ".join(f"{type(failure).__name__}: {failure}".split())
                teller.sendto(said.encode()[:LONGEST], f"\0{self.name}")
        return True


def _is_of_weights(failure: BaseException) -> bool:
    if isinstance(failure, OutOfMemoryError | AcceleratorError):
        return False
    frames = (frame for frame, _ in traceback.walk_tb(failure.__traceback__))
    return any(frame.f_code.co_name in LOADING for frame in frames)
