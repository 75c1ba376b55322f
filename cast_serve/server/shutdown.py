"""What the log says while a server that was asked to stop is stopping."""

import logging

from vllm.v1.engine.exceptions import EngineDeadError


class ExpectedEngineExit(logging.Filter):
    """Drops the traceback about a dead engine once a shutdown has begun.

    After draining, the engine exits while vLLM's front end still waits for its next output, and
    reports that as a failure.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shutting_down = False

    def filter(self, record: logging.LogRecord) -> bool:
        if record.getMessage().startswith("[shutdown]"):
            self.shutting_down = True
        error = record.exc_info[0] if record.exc_info else None
        return not (self.shutting_down and error and issubclass(error, EngineDeadError))


def quiet_expected_exit() -> None:
    """Put ExpectedEngineExit on the handlers of vLLM's loggers."""
    expected_exit = ExpectedEngineExit()
    for handler in logging.getLogger("vllm").handlers:
        handler.addFilter(expected_exit)
