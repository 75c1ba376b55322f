"""What the log says when the engine ends."""

import logging

from vllm.v1.engine.exceptions import EngineDeadError

FRONT_END = "vllm.v1.engine.async_llm"


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
