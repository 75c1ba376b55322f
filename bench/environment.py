"""What a measurement ran on: GPU, driver, library versions, commit, date."""

import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).parent.parent


def require_gpu() -> torch.device:
    """The current CUDA device.

    Raises:
        ValueError: there is none.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            f"needs an NVIDIA GPU, and torch {torch.__version__} sees none; "
            "`python -m bench.render` shows the results there are without one"
        )
    return torch.device("cuda", torch.cuda.current_device())


def describe(device: torch.device, *, commit: str | None = None) -> dict[str, Any]:
    """The environment of a run, by name, for a result file and for printing.

    `run` names the run: its date and the start of its commit. `commit` is for a checkout without
    git, such as a copy on another machine.
    """
    gpu = torch.cuda.get_device_properties(device)
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    commit = commit or _commit()
    return {
        "run": f"{date} {commit}",
        "gpu": gpu.name,
        "sm": f"sm_{gpu.major}{gpu.minor}",
        "sm_count": gpu.multi_processor_count,
        "memory_gib": round(gpu.total_memory / 2**30, 1),
        "l2_mib": round(gpu.L2_cache_size / 2**20, 1),
        "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cusparselt": _cusparselt(),
        "commit": commit,
        "date": date,
    }


def slug(gpu: str) -> str:
    """A GPU's name as a file name: "NVIDIA H100 80GB HBM3" is h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.removeprefix("NVIDIA ").lower()).strip("-")


def _cusparselt() -> str:
    """The version that torch was built with, as NVIDIA writes it: 800 is 0.8.0."""
    version = torch.backends.cusparselt.version()
    if version is None:
        return "none"
    return f"{version // 1000}.{version // 100 % 10}.{version % 100}"


def _commit() -> str:
    """HEAD, with a mark if tracked files differ from it."""
    head = _command("git", "rev-parse", "HEAD")
    changed = head != "unknown" and _command("git", "status", "--porcelain", "-uno") != ""
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
