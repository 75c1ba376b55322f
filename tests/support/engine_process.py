"""A vLLM engine in a process of its own, asked to load a checkpoint and complete fixed prompts."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine_worker import SERVING

WORKER = Path(__file__).with_name("engine_worker.py")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Greedy tokens of each prompt, the log-probability of each token, and more of each prompt.

    Attributes:
        likely: at each step the most likely tokens, five or six.
        cached_tokens: how many of a prompt's came from the prefix cache.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    likely: list[list[list[int]]]
    cached_tokens: list[int]

    def assert_equals(self, oracle: "Answer", tolerance: float = 1e-3) -> None:
        assert self.tokens == oracle.tokens
        for ours, theirs in zip(self.logprobs, oracle.logprobs, strict=True):
            assert ours == pytest.approx(theirs, abs=tolerance)

    def assert_close(self, oracle: "Answer") -> None:
        """vLLM's own rule for sums in another order, `check_logprobs_close` of its tests.

        Where the tokens of a prompt first differ, each must be among the other's likely ones; what
        follows is not compared.
        """
        for index, (ours, theirs) in enumerate(zip(self.tokens, oracle.tokens, strict=True)):
            assert len(ours) == len(theirs)
            for step, (our, their) in enumerate(zip(ours, theirs, strict=True)):
                if our == their:
                    continue
                assert our in oracle.likely[index][step], f"prompt {index}, token {step}"
                assert their in self.likely[index][step], f"prompt {index}, token {step}"
                break


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

    def said_while_serving(self) -> str:
        """The log of the last checkpoint from where it had started."""
        return self.log.read_text().rpartition(SERVING)[2]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.errors.close()
