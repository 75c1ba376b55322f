"""One engine process for all tests, the tiny models, and what stock vLLM answers on them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_process import Answer, Engine
from tiny_models import write_stored


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
    folder = tmp_path_factory.mktemp("stored")
    written: dict[str, Path] = {}

    def of(architecture: str) -> Path:
        if architecture not in written:
            written[architecture] = folder / architecture
            write_stored(architecture, written[architecture])
        return written[architecture]

    return of
