"""A disk without room for caches: the server starts and answers all the same."""

import signal
import subprocess
from pathlib import Path

import httpx
import pytest
from server_process import Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama-2of4"
# Folders can be made, and no byte of a file written.
FULL = """
mount -t tmpfs -o size=8k tmpfs "$0" || exit
head -c 16k /dev/zero > "$0/filler"
exec "$@"
"""


def on_a_full_disk(folder: Path) -> list[str]:
    """Runs a command that sees `folder` on a disk of its own, which is full."""
    folder.mkdir()
    private = ["unshare", "--map-root-user", "--mount"]
    tried = subprocess.run([*private, "mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
    if tried.returncode:
        pytest.skip(f"needs user namespaces: {tried.stderr.decode().strip()}")
    return [*private, "sh", "-c", FULL, str(folder)]


def test_it_is_full(tmp_path):
    before = on_a_full_disk(tmp_path / "home")
    wrote = subprocess.run(
        [*before, "sh", "-c", f"echo a > {tmp_path}/home/file"], capture_output=True, text=True
    )
    assert "No space left on device" in wrote.stderr


def test_server(tmp_path):
    home = tmp_path / "home"
    server = Server(
        MODEL,
        tmp_path / "log",
        *("--served-model-name", "tiny", "--enforce-eager"),
        environment={"HOME": str(home), "XDG_CACHE_HOME": f"{home}/.cache"},
        before=on_a_full_disk(home),
    )
    server.wait_ready()
    body = {"model": "tiny", "prompt": "it was", "max_tokens": 8}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).is_success
    assert server.stop(signal.SIGTERM) == 0
