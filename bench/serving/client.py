"""Drives a server with vllm.benchmarks.serve, and reads what it measured."""

import json
import select
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cast_serve.bench.serving.engine_times import FirstTokens
from cast_serve.bench.serving.process import end, start
from cast_serve.bench.serving.server import ServerError
from cast_serve.bench.serving.vllm_command import MODULE
from cast_serve.bench.serving.workloads import Workload, mixed_lengths, write_mixed

# The longest workload takes 15 s on an H100; on a CPU minutes.
WORKLOAD_SECONDS = 1800

# What servers are asked for under.
SERVED_NAME = "model"


class MeasurementError(RuntimeError):
    """A workload of which a request failed, or did not have the length asked for."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run of a workload.

    Attributes:
        ttft_ms: time to the first token, median over requests; ttft_p99_ms the 99th percentile,
            ttft_mean_ms the mean.
        ttft_engine_ms: mean of what of it passes in the engine, warm-ups included; the rest is the
            front end's, which parses, tokenizes and streams. None without statistics.
        tpot_ms: time per output token after the first, likewise; None where only one is asked for.
        output_tokens_per_s: over all requests and the whole run.
    """

    ttft_ms: float
    ttft_p99_ms: float
    ttft_mean_ms: float
    ttft_engine_ms: float | None
    tpot_ms: float | None
    tpot_p99_ms: float | None
    output_tokens_per_s: float

    @classmethod
    def of(
        cls, result: dict[str, Any], workload: Workload, *, ttft_engine_ms: float | None
    ) -> "Measurement":
        """From the JSON that vllm.benchmarks.serve saves.

        Raises:
            MeasurementError: not every request was answered, and with the length asked for.
        """
        if result["failed"] or result["completed"] != workload.num_prompts:
            raise MeasurementError(
                f"{workload.name}: {result['completed']} of {workload.num_prompts} requests were "
                f"answered, {result['failed']} failed"
            )
        asked = total_tokens(workload)
        answered = (result["total_input_tokens"], result["total_output_tokens"])
        if answered != asked:
            raise MeasurementError(
                f"{workload.name}: {answered[0]} tokens in and {answered[1]} out, "
                f"where {asked[0]} and {asked[1]} were asked for"
            )
        decodes = not workload.is_prefill
        return cls(
            ttft_ms=result["median_ttft_ms"],
            ttft_p99_ms=result["p99_ttft_ms"],
            ttft_mean_ms=result["mean_ttft_ms"],
            ttft_engine_ms=ttft_engine_ms,
            tpot_ms=result["median_tpot_ms"] if decodes else None,
            tpot_p99_ms=result["p99_tpot_ms"] if decodes else None,
            output_tokens_per_s=result["output_throughput"],
        )


def total_tokens(workload: Workload) -> tuple[int, int]:
    """Tokens in and out of all requests of `workload`."""
    if workload.input_len is None or workload.output_len is None:
        inputs, outputs = zip(*mixed_lengths(workload.num_prompts), strict=True)
        return sum(inputs), sum(outputs)
    return (
        workload.num_prompts * workload.input_len,
        workload.num_prompts * workload.output_len,
    )


class Client:
    """A process that runs one workload after the other; leaving its context ends it."""

    def __init__(self, tokenizer: Path, words: int, folder: Path, log: Path) -> None:
        """Start the process, which imports vLLM while the server starts.

        Args:
            tokenizer: a model folder; `words` the size of its vocabulary.
            folder: for what is sent and what was measured.
        """
        self.tokenizer = tokenizer
        self.words = words
        self.folder = folder
        self.log = log
        folder.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self.process = start(
                ["-m", MODULE, "clients"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        end(self.process, patience=5)

    def measure(self, url: str, workload: Workload, *, repeat: int) -> Measurement:
        """Run `workload` once against the server at `url`.

        Args:
            repeat: prompts differ from one to the next, and are the same for every engine.

        Raises:
            ServerError: the client ended, or took too long; with the end of its log. Or the server
                does not answer.
            MeasurementError: not every request was answered with the length asked for.
        """
        result = self.folder / f"{workload.name}-{repeat}.json"
        flags = self._flags(url, workload, repeat, result)
        assert self.process.stdin is not None and self.process.stdout is not None
        before = FirstTokens.read(url)
        try:
            print(json.dumps(flags), file=self.process.stdin, flush=True)
        except BrokenPipeError as error:
            raise self._failure("the benchmark client had ended") from error
        ready, _, _ = select.select([self.process.stdout], [], [], WORKLOAD_SECONDS)
        if not ready:
            raise self._failure(f"{workload.name} was not over after {WORKLOAD_SECONDS} s")
        if self.process.stdout.readline() != "done\n":
            raise self._failure(f"the benchmark client ended during {workload.name}")
        in_engine = FirstTokens.read(url).mean_ms_since(before)
        return Measurement.of(json.loads(result.read_text()), workload, ttft_engine_ms=in_engine)

    def _flags(self, url: str, workload: Workload, repeat: int, result: Path) -> list[str]:
        if workload.input_len is None or workload.output_len is None:
            # Not --dataset-name custom: it needs pandas.
            conversations = self.folder / f"{workload.name}.sharegpt.json"
            write_mixed(conversations, count=workload.num_prompts, words=self.words)
            data = ["--dataset-name", "sharegpt", "--dataset-path", str(conversations)]
        else:
            data = ["--dataset-name", "random"]
            data += ["--random-input-len", str(workload.input_len)]
            data += ["--random-output-len", str(workload.output_len)]
        return [
            *data,
            *("--backend", "openai", "--endpoint", "/v1/completions", "--base-url", url),
            *("--model", SERVED_NAME, "--tokenizer", str(self.tokenizer)),
            *("--num-prompts", str(workload.num_prompts)),
            *("--num-warmups", str(workload.num_warmups)),
            *("--max-concurrency", str(workload.concurrency)),
            *("--seed", str(repeat), "--temperature", "0", "--ignore-eos", "--disable-tqdm"),
            *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "99"),
            *("--save-result", "--result-dir", str(result.parent)),
            *("--result-filename", result.name),
        ]

    def _failure(self, what: str) -> ServerError:
        return ServerError.of_log(what, self.log)
