"""What the log says when the engine ends, and when the server does."""

import asyncio
import logging

from vllm.v1.engine.exceptions import EngineDeadError

FRONT_END = "vllm.v1.engine.async_llm"
HTTP_SERVER = "uvicorn.error"


class EngineExitIsNoFailure(logging.Filter):
    """Turns the front end's traceback about an engine that is gone into a line.

    It waits for the next output of the engine, also of one that has drained and exited as it was
    asked to. Where the engine did fail, the engine's own traceback stands above.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], EngineDeadError):
            record.exc_info = None
            record.levelno, record.levelname = logging.INFO, "INFO"
            record.msg, record.args = "The engine has stopped.", ()
        return True


def quiet_engine_exit() -> None:
    """Put the filter on vLLM's front end.

    On its logger and not on the handlers of "vllm": those are replaced when vLLM configures logs.
    """
    logging.getLogger(FRONT_END).addFilter(EngineExitIsNoFailure())


class BrokenOffIsNoFailure(logging.Filter):
    """Leaves out uvicorn's tracebacks of the requests that it cancels as it stops.

    One each, of clients that do not read. Its line before them says how many they are.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def quiet_broken_off() -> None:
    """Put the filter on uvicorn's logger, in each process that serves."""
    logging.getLogger(HTTP_SERVER).addFilter(BrokenOffIsNoFailure())
