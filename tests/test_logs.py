"""Lines of cast_serve come out where vLLM's do, at vLLM's level, once."""

import io
import logging
from collections.abc import Iterator

import pytest

from cast_serve.logs import join_vllm


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Both loggers start without handlers, and get back what they had."""
    loggers = [logging.getLogger(name) for name in ("vllm", "cast_serve")]
    before = [(list(x.handlers), x.level, x.propagate) for x in loggers]
    for logger in loggers:
        logger.handlers = []
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers = handlers
        logger.setLevel(level)
        logger.propagate = propagate


def configure_vllm(level: str) -> io.StringIO:
    stream = io.StringIO()
    vllm = logging.getLogger("vllm")
    vllm.handlers = [logging.StreamHandler(stream)]
    vllm.setLevel(level)
    vllm.propagate = False
    return stream


def test_lines_go_where_those_of_vllm_go():
    join_vllm()
    join_vllm()
    # vLLM configures logs after it has loaded its plugins, and again.
    first = configure_vllm("INFO")
    logging.getLogger("cast_serve.kernels.selection").info("timed")
    second = configure_vllm("WARNING")
    logging.getLogger("cast_serve.kernels.selection").info("timed again")
    logging.getLogger("cast_serve.linear").warning("dense")
    assert (first.getvalue(), second.getvalue()) == ("timed\n", "dense\n")


def test_own_configuration_is_left_alone():
    stream = io.StringIO()
    own = logging.StreamHandler(stream)
    logging.getLogger("cast_serve").addHandler(own)
    join_vllm()
    vllm = configure_vllm("INFO")
    logging.getLogger("cast_serve.linear").warning("dense")
    assert (stream.getvalue(), vllm.getvalue()) == ("dense\n", "")
