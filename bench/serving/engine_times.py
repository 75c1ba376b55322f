"""What a server's engine measures by itself: the client's times less those of the front end."""

import urllib.request
from dataclasses import dataclass
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

from cast_serve.bench.serving.server import ServerError

# vLLM's histograms; the engine takes both times, and they are observed when a request ends.
_QUEUE = "vllm:request_queue_time_seconds"
_PREFILL = "vllm:request_prefill_time_seconds"


@dataclass(frozen=True)
class FirstTokens:
    """Of all requests that have ended.

    Attributes:
        requests: how many.
        seconds: summed over them, from the arrival in the engine to the first token there.
    """

    requests: int
    seconds: float

    @classmethod
    def read(cls, url: str) -> Self:
        """From /metrics of the server at `url`; zeros where it keeps no statistics.

        Raises:
            ServerError: it does not answer.
        """
        try:
            with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
                return cls.of(answer.read().decode())
        except OSError as error:
            raise ServerError(f"{url}/metrics does not answer: {error}") from error

    @classmethod
    def of(cls, metrics: str) -> Self:
        """From the text of /metrics, of vLLM 0.26 to 0.32; summed over engines."""
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(metrics):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return cls(
            requests=int(sums.get(f"{_PREFILL}_count", 0)),
            seconds=sums.get(f"{_QUEUE}_sum", 0.0) + sums.get(f"{_PREFILL}_sum", 0.0),
        )

    def mean_ms_since(self, before: "FirstTokens") -> float | None:
        """Mean over the requests that have ended since `before`; None if none has."""
        ended = self.requests - before.requests
        return 1e3 * (self.seconds - before.seconds) / ended if ended > 0 else None
