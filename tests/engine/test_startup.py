"""Starts of the server: what they take time for, and what a second one need not do again."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import Server

# Three engine starts, two of which compile.
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.release]

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-llama-2of4"


def test_every_phase_is_seen():
    """vLLM still logs the lines that phases end with."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "startup.py", "--model", MODEL, "--enforce-eager"],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (phases,) = json.loads(done.stdout.splitlines()[-1])["starts"]
    assert [name.split(":")[0].split(",")[0] for name in phases] == [
        *("front end", "engine's process", "worker's process", "weights"),
        *("KV cache", "front end", "first token"),
    ]
    assert all(seconds > 0 for seconds in phases.values())


def test_second_start_loads_what_the_first_compiled(tmp_path):
    caches = {"VLLM_CACHE_ROOT": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "code")}
    for log in (tmp_path / "first", tmp_path / "second"):
        server = Server(MODEL, log, "--kv-cache-memory-bytes", "256M", environment=caches)
        server.wait_ready()
        server.stop(signal.SIGTERM)
        assert "Warming up done" in log.read_text()
    assert list((tmp_path / "code").rglob("*.so"))
    assert "Compiling model again" not in log.read_text()
