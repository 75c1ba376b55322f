"""Kernels compile for the GPUs under Triton 3.6.0 too, the oldest allowed, which PyTorch 2.11 has.

CAST_SERVE_TRITON_36 names a folder that holds it; `make test-slow` makes one (scripts/triton36.sh).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Minutes.
pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
FOLDER = os.environ.get("CAST_SERVE_TRITON_36")


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """In which Python imports Triton 3.6."""
    if not FOLDER:
        pytest.skip("CAST_SERVE_TRITON_36 names no folder with Triton 3.6.0")
    path = os.pathsep.join(filter(None, (FOLDER, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    ask = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    version = subprocess.run(ask, capture_output=True, text=True, check=True, env=environment)
    assert version.stdout.startswith("3.6."), f"{FOLDER} holds Triton {version.stdout}"
    return environment


@pytest.mark.parametrize(
    "file",
    ["kernels/test_mma_sp_compiles", "trainer/test_adams_compiles", "trainer/test_distill_triton"],
)
def test_compiles(environment: dict[str, str], file: str) -> None:
    tests = [sys.executable, "-m", "pytest", "-q", "-x", TESTS / f"{file}.py"]
    done = subprocess.run(tests, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-4000:]
