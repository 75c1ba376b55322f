"""The log of cast_serve inside vLLM, which sets up loggers below its own name only."""

import logging


class ToVLLM(logging.Handler):
    """Hands records to the logger `vllm`, under the level and handlers that it then has.

    vLLM replaces its handlers whenever it configures logs, so they cannot be taken over once.
    """

    def emit(self, record: logging.LogRecord) -> None:
        vllm = logging.getLogger("vllm")
        if vllm.isEnabledFor(record.levelno):
            vllm.handle(record)


def join_vllm() -> None:
    """Send what `cast_serve.*` logs to where vLLM's own lines go.

    Does nothing where the logger `cast_serve` has handlers: then the user has configured it, and
    keeps the choice.
    """
    ours = logging.getLogger("cast_serve")
    if ours.handlers:
        return
    ours.addHandler(ToVLLM())
    # All: vLLM's level decides.
    ours.setLevel(logging.DEBUG)
    ours.propagate = False
