"""GPU tests skip with a reason where there is no GPU; uninitialised memory holds NaN on request."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

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
