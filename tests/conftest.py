"""GPU tests skip with a reason where there is no GPU; uninitialised memory holds NaN on request."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# What decides a test is not how long it took: a machine may stall.
settings.register_profile("without a clock", deadline=None)
settings.load_profile("without a clock")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason=f"needs an NVIDIA GPU: torch {torch.__version__} sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty gives NaN, or the largest integer: what a kernel leaves unwritten shows."""
    # cuBLAS warns in deterministic mode unless its workspace is fixed.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The fill only happens in deterministic mode; warn_only: which ops have one is not the matter.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def vllm_config(tmp_path: Path) -> Iterator["VllmConfig"]:
    """With a tensor-parallel group of one: vLLM's parameters ask for their rank."""
    # Slow to import, and of few tests.
    from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    config = VllmConfig(load_config=LoadConfig(load_format="auto"))
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{tmp_path / 'rendezvous'}", 0, "gloo")
        initialize_model_parallel()
        yield config
        cleanup_dist_env_and_memory()
