"""Tiny random models of several architectures, in every format, and one engine process for all."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


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
            [sys.executable, str(HERE / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **environment},
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


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One process without workers of its own: an engine start takes seconds in it."""
    log = tmp_path_factory.mktemp("engine") / "stderr"
    running = Engine(log, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    yield running
    running.close()


@pytest.fixture(scope="session")
def oracle(engine: Engine, stored: Callable[[str], Path]) -> Callable[[str], Answer]:
    """What stock vLLM answers on the dense-stored weights of an architecture."""
    answers: dict[str, Answer] = {}

    def of(architecture: str) -> Answer:
        if architecture not in answers:
            answers[architecture] = engine(stored(architecture))
        return answers[architecture]

    return of


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A dense-stored 2:4 checkpoint of an architecture, as any pruning tool writes it."""
    from tiny_models import write_stored

    folder = tmp_path_factory.mktemp("stored")
    written: dict[str, Path] = {}

    def of(architecture: str) -> Path:
        if architecture not in written:
            written[architecture] = folder / architecture
            write_stored(architecture, written[architecture])
        return written[architecture]

    return of
