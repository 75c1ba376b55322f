"""What is read from a server's /metrics."""

import socket

import pytest

from cast_serve.bench.serving.engine_times import FirstTokens
from cast_serve.bench.serving.server import ServerError

# Of vLLM 0.32 with two engines; labels and buckets that are not read are cut.
METRICS = """\
# HELP vllm:request_queue_time_seconds Histogram of time spent in WAITING phase for request.
# TYPE vllm:request_queue_time_seconds histogram
vllm:request_queue_time_seconds_bucket{engine="0",le="+Inf"} 3.0
vllm:request_queue_time_seconds_count{engine="0"} 3.0
vllm:request_queue_time_seconds_sum{engine="0"} 0.03
vllm:request_queue_time_seconds_count{engine="1"} 1.0
vllm:request_queue_time_seconds_sum{engine="1"} 0.01
# HELP vllm:request_prefill_time_seconds Histogram of time spent in PREFILL phase for request.
# TYPE vllm:request_prefill_time_seconds histogram
vllm:request_prefill_time_seconds_bucket{engine="0",le="+Inf"} 3.0
vllm:request_prefill_time_seconds_count{engine="0"} 3.0
vllm:request_prefill_time_seconds_sum{engine="0"} 0.3
vllm:request_prefill_time_seconds_count{engine="1"} 1.0
vllm:request_prefill_time_seconds_sum{engine="1"} 0.06
"""


def test_sums_over_engines() -> None:
    found = FirstTokens.of(METRICS)
    assert found.requests == 4
    assert found.seconds == pytest.approx(0.4)


def test_mean_is_of_those_since() -> None:
    assert FirstTokens(6, 0.7).mean_ms_since(FirstTokens(4, 0.4)) == pytest.approx(150)


def test_without_statistics() -> None:
    """Of a server with --disable-log-stats, say."""
    nothing = FirstTokens.of("python_info 1.0\n")
    assert nothing == FirstTokens(0, 0.0)
    assert nothing.mean_ms_since(nothing) is None


def test_server_that_is_gone() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ServerError, match=f"{url}/metrics does not answer"):
        FirstTokens.read(url)
