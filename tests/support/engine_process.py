"""A vLLM engine in a process of its own, asked to load a checkpoint and complete fixed prompts."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("engine_worker.py")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Greedy tokens of each prompt, and the log-probability of each token."""

    tokens: list[list[int]]
    logprobs: list[list[float]]

    def assert_equals(self, oracle: "Answer", tolerance: float = 1e-3) -> None:
        assert self.tokens == oracle.tokens
        for ours, theirs in zip(self.logprobs, oracle.logprobs, strict=True):
            assert ours == pytest.approx(theirs, abs=tolerance)


class EngineError(Exception):
    """What the engine raised, as "Type: message"."""


class Engine:
    """A process that loads one checkpoint after the other and completes fixed prompts."""

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        self.log = log
        self.errors = log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={
                **os.environ,
                "VLLM_CPU_KVCACHE_SPACE": "1",
                # stdout is for answers; without this vLLM logs there.
                "VLLM_LOGGING_STREAM": "ext://sys.stderr",
                **environment,
            },
        )

    def __call__(self, model: Path, **options: Any) -> Answer:
        """Load `model` with the keyword arguments of vllm.LLM and complete the prompts.

        Raises:
            EngineError: the engine refused.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"model": str(model), **options}), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                answer = json.loads(line.removeprefix("ANSWER "))
                if "error" in answer:
                    raise EngineError(answer["error"])
                return Answer(**answer)
        raise AssertionError(f"the engine process died:\n{self.log.read_text()[-5000:]}")

    def log_since(self, mark: int) -> str:
        return self.log.read_text()[mark:]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.errors.close()
