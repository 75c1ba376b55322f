"""What is read from the JSON of vllm.benchmarks.serve."""

from typing import Any

import pytest

from cast_serve.bench.serving.client import Measurement, MeasurementError, total_tokens
from cast_serve.bench.serving.workloads import SMOKE, find_workloads

# vLLM 0.32's CPU build on examples' size of model, --workloads smoke; what is not read is cut.
RESULT: dict[str, Any] = {
    "backend": "openai",
    "num_prompts": 8,
    "max_concurrency": 4,
    "duration": 0.5389456880002399,
    "completed": 8,
    "failed": 0,
    "total_input_tokens": 512,
    "total_output_tokens": 128,
    "request_throughput": 14.843796282486332,
    "output_throughput": 237.50074051978132,
    "mean_ttft_ms": 108.1106971241752,
    "median_ttft_ms": 79.78801500030386,
    "p99_ttft_ms": 210.86352981990785,
    "mean_tpot_ms": 9.942236733362128,
    "median_tpot_ms": 10.064220433317436,
    "p99_tpot_ms": 10.757013828673127,
    "median_itl_ms": 9.699528998680762,
}


def test_measurement() -> None:
    assert Measurement.of(RESULT, SMOKE, ttft_engine_ms=31.5) == Measurement(
        ttft_ms=79.78801500030386,
        ttft_p99_ms=210.86352981990785,
        ttft_mean_ms=108.1106971241752,
        ttft_engine_ms=31.5,
        tpot_ms=10.064220433317436,
        tpot_p99_ms=10.757013828673127,
        output_tokens_per_s=237.50074051978132,
    )


def test_prefill_has_no_tpot() -> None:
    """vLLM writes 0.0 there."""
    (prefill,) = find_workloads("prefill-2048")
    count = {"completed": 24, "total_input_tokens": 24 * 2048, "total_output_tokens": 24}
    zeros = {"median_tpot_ms": 0.0, "p99_tpot_ms": 0.0}
    measured = Measurement.of({**RESULT, **count, **zeros}, prefill, ttft_engine_ms=None)
    assert measured.tpot_ms is None and measured.tpot_p99_ms is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completed": 7, "failed": 1}, "smoke: 7 of 8 requests were answered, 1 failed"),
        ({"completed": 0, "failed": 0}, "smoke: 0 of 8 requests were answered"),
        ({"total_output_tokens": 127}, "512 tokens in and 127 out, where 512 and 128 were asked"),
        ({"total_input_tokens": 520}, "520 tokens in and 128 out, where 512 and 128 were asked"),
    ],
)
def test_measurement_refuses(change: dict[str, int], message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        Measurement.of({**RESULT, **change}, SMOKE, ttft_engine_ms=None)


def test_total_tokens_of_mixed() -> None:
    """As vLLM 0.26 and 0.32 count the file that is written for it."""
    (mixed,) = find_workloads("mixed")
    assert total_tokens(mixed) == (59496, 53170)
