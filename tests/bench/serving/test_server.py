"""Servers as processes: what their logs say, and that none is left behind."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cast_serve.bench.serving.process import end
from cast_serve.bench.serving.server import Server, ServerError, Startup
from cast_serve.server.family import left_running

# vLLM 0.32's CPU build, as logged; it does not say what the weights take.
CPU_LOG = """\
(Worker pid=25309) INFO 11-22 08:59:21 [base_loader.py:82] Initializing model took 0.223269 seconds
(EngineCore pid=25281) INFO 11-22 08:59:22 [utils.py:347] Using LBHNC KV cache layout.
(Worker pid=25309) INFO 11-22 08:59:44 [cpu_worker.py:260] Explicitly set (1.0/20.34) GiB for KV \
cache on node 0.
(EngineCore pid=25281) INFO 11-22 08:59:44 [kv_cache_utils.py:2327] CPU KV cache size: 1,048,576 \
tokens, Maximum concurrency for 16,384 tokens per request: 64.00x
"""

# The formats of vLLM 0.26: gpu_model_runner.py:5348, gpu_worker.py:561, kv_cache_utils.py:2177.
GPU_LOG = """\
(EngineCore pid=411) INFO 11-22 08:59:21 [default_loader.py:480] Loading weights took 1.20 seconds
(EngineCore pid=411) INFO 11-22 08:59:21 [gpu_model_runner.py:5348] Model loading took 14.99 GiB \
memory and 2.345678 seconds
(EngineCore pid=411) INFO 11-22 08:59:40 [gpu_worker.py:561] Available KV cache memory: 54.21 GiB
(EngineCore pid=411) INFO 11-22 08:59:40 [kv_cache_utils.py:2177] GPU KV cache size: 444,096 tokens
(EngineCore pid=411) INFO 11-22 08:59:40 [kv_cache_utils.py:2178] Maximum concurrency for 16,384 \
tokens per request: 27.11x
"""


def test_startup_on_cpu() -> None:
    assert Startup.of(CPU_LOG) == Startup(weights_gib=None, load_s=None, kv_tokens=1048576)


def test_startup_on_gpu() -> None:
    assert Startup.of(GPU_LOG) == Startup(weights_gib=14.99, load_s=2.345678, kv_tokens=444096)


def test_startup_of_files_on_cpu() -> None:
    """Reading is logged where files are read."""
    read = GPU_LOG.splitlines()[0] + "\n" + CPU_LOG
    assert Startup.of(read) == Startup(weights_gib=None, load_s=1.2, kv_tokens=1048576)


def test_host_gib(tmp_path: Path) -> None:
    """Of the largest process, a child here, which holds half a GiB."""
    child = "import sys, time; held = bytearray(1 << 29); print(1, flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with Server(["-c", parent], tmp_path / "log") as server:
        while not (tmp_path / "log").read_text():
            time.sleep(0.1)
        assert 0.5 < server.host_gib() < 0.6


def test_startup_refuses_other_logs() -> None:
    said = r"how large the KV cache is; the log ends:\nINFO: started"
    with pytest.raises(ServerError, match=said) as caught:
        Startup.of("INFO: started\n")
    assert caught.value.reason == "the log does not say how large the KV cache is"


def test_server_that_dies(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "server.log"
    with (
        pytest.raises(ServerError, match=r"ended with status 1; .*\n.*\nout of memory$"),
        Server(["-c", "import sys; print('loading'); sys.exit('out of memory')"], log) as server,
    ):
        server.wait()
    assert log.read_text() == "loading\nout of memory\n"


def test_server_that_hangs(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerError, match="not up after 1 s"),
        Server(["-c", "import time; time.sleep(60)"], tmp_path / "log") as server,
    ):
        server.wait(seconds=1)
    assert server.process.poll() is not None


def test_server_that_starts_is_not_waited_for(tmp_path: Path) -> None:
    """On Ctrl-C: stock vLLM does not listen to SIGTERM for most of its start."""
    program = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('deaf'); time.sleep(60)"
    )
    log = tmp_path / "log"
    with contextlib.suppress(KeyboardInterrupt), Server(["-c", program], log):
        while "deaf" not in log.read_text():
            time.sleep(0.05)
        begin = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - begin < 30


def test_end_kills_the_whole_family(tmp_path: Path) -> None:
    """A server that ignores SIGTERM, and a worker of it in a session of its own."""
    program = (
        "import signal, subprocess, sys, time;"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
        " start_new_session=True);"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(f'{{worker.pid}}.');"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    written = tmp_path / "pid"
    while not written.exists() or not written.read_text().endswith("."):
        time.sleep(0.05)
    worker = psutil.Process(int(written.read_text().rstrip(".")))
    end(process, patience=1)
    assert process.poll() is not None
    assert left_running([worker], seconds=0) == []
