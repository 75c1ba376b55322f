"""The linters of what deploy/ holds; where one is missing, its tests skip and name it."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

# In no wheel: `.ci/run` installs them.
DEBIAN = {
    "docker-compose": "docker-compose",
    "promtool": "prometheus",
    "systemd-analyze": "systemd",
}


@pytest.fixture(scope="session")
def tool() -> Callable[[str], Run]:
    """Runs a tool of this environment, or else of the PATH."""

    def find(name: str) -> Run:
        beside = Path(sys.executable).with_name(name)
        path = str(beside) if beside.exists() else shutil.which(name)
        if path is None:
            package = f"; apt-get install {DEBIAN[name]}" if name in DEBIAN else ""
            pytest.skip(f"needs {name}{package}")

        def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [path, *map(str, arguments)], capture_output=True, text=True, timeout=120
            )

        return run

    return find


@pytest.fixture(scope="session")
def drain_seconds() -> int:
    """How long a stopping server may still answer, unless --shutdown-timeout says otherwise."""
    from cast_serve.server.arguments import DRAIN_SECONDS

    return DRAIN_SECONDS
