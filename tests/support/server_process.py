"""cast-serve as a process of its own, as its users run it."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import openai
import psutil
from prometheus_client.parser import text_string_to_metric_families

CAST_SERVE = str(Path(sys.executable).with_name("cast-serve"))
# As on a user's machine: the size of the KV cache is cast-serve's to choose.
ENVIRONMENT = {name: v for name, v in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}


class Server:
    """A running cast-serve; `wait_ready` blocks until its curl line is printed."""

    def __init__(
        self,
        model: Path,
        log: Path,
        *flags: str,
        environment: dict[str, str] | None = None,
        before: Sequence[str] = (),
    ) -> None:
        """Start it; `before` is a command that runs another, such as `unshare`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [*before, CAST_SERVE, "--model", str(model), "--port", str(self.port), *flags],
                stdout=errors,
                stderr=errors,
                env={**ENVIRONMENT, **(environment or {})},
                start_new_session=True,
            )

    def wait_for(self, pattern: str, seconds: float = 400) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := re.search(pattern, self.log.read_text(), re.MULTILINE):
                return found.group()
            if self.process.poll() is not None:
                break
            time.sleep(0.2)
        raise AssertionError(f"no {pattern!r} in:\n{self.log.read_text()[-5000:]}")

    def wait_ready(self) -> str:
        line = self.wait_for(r"^  curl .*$").strip()
        self._yield_to_others()
        return line

    def _yield_to_others(self) -> None:
        """Lower the engines' priority, below the API server's and the test's.

        While it has work an engine on a CPU never sleeps. Some virtual machines' kernels interrupt
        such a process so rarely that whoever shares its core waits for seconds, if not until the
        answer has ended: nothing would stream, and an abort would come too late.
        """
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if "EngineCore" in " ".join(process.cmdline()):
                # Of a process Linux would lower the first thread only.
                for thread in process.threads():
                    with contextlib.suppress(ProcessLookupError):
                        os.setpriority(os.PRIO_PROCESS, thread.id, 19)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def metric(self, name: str, **labels: str) -> float:
        """Of /metrics, a sample's value summed over the labels that are not given."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key)

    def stop(self, number: signal.Signals) -> int:
        """Exit status after a signal: SIGTERM as from systemd, SIGINT as a terminal sends it."""
        if self.process.poll() is not None:
            return self.process.returncode
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        return self.process.wait(timeout=120)
