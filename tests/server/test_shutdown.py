"""The log of vLLM's front end when the engine is gone."""

import logging

import pytest


@pytest.fixture
def front_end():
    from cast_serve.server import shutdown

    logger = logging.getLogger(shutdown.FRONT_END)
    before = list(logger.filters)
    shutdown.quiet_engine_exit()
    yield logger
    logger.filters = before


def test_engine_exit_is_one_line(front_end, caplog):
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        raise EngineDeadError()
    except EngineDeadError:
        front_end.exception("AsyncLLM output_handler failed.")
    assert [(r.levelname, r.getMessage(), r.exc_info) for r in caplog.records] == [
        ("INFO", "The engine has stopped.", None)
    ]


def test_other_failures_keep_their_traceback(front_end, caplog):
    try:
        raise ValueError("x")
    except ValueError:
        front_end.exception("AsyncLLM output_handler failed.")
    assert [(r.levelname, r.exc_info is not None) for r in caplog.records] == [("ERROR", True)]
