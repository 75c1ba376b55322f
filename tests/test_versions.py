"""`cast-serve --version`: what is installed, without starting anything."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cast_serve import versions
from cast_serve.kernels.registry import KERNELS

CAST_SERVE = str(Path(sys.executable).with_name("cast-serve"))


def test_command():
    printed = subprocess.run([CAST_SERVE, "--version"], capture_output=True, text=True, check=True)
    rows = dict(line.split("  ", 1) for line in printed.stdout.splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    # Not compared: a build leaves metadata in the checkout, which tests see before that installed.
    assert rows.pop("cast-serve")[0].isdigit()
    assert rows.items() < versions.describe().items()
    assert rows["PyTorch"] == torch.__version__
    assert {f"kernel {name}" for name in KERNELS} <= set(rows)


def test_imports_no_vllm():
    program = "import sys, cast_serve.versions as v; v.describe(); print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    described = versions.describe()
    assert described["CUDA"] == "none: this PyTorch is a CPU build"
    assert described["GPU"] == "none seen by PyTorch: sparse layers run dense"
    assert all(described[f"kernel {name}"] == "needs an NVIDIA GPU" for name in KERNELS)


@pytest.mark.gpu
def test_kernels_on_this_gpu():
    described = versions.describe()
    assert torch.cuda.get_device_name() in described["GPU"]
    on_hopper = torch.cuda.get_device_capability() == (9, 0)
    assert (described["kernel wgmma_sp"] == "runs here") == on_hopper


@pytest.mark.parametrize(
    ("packages", "expected"),
    [
        (["torch", "vllm"], torch.__version__),
        (["no-such-package", "torch"], f"{torch.__version__} (torch)"),
        (["no-such-package"], "not installed"),
    ],
)
def test_version_of_the_first_installed(packages, expected):
    assert versions._version(*packages) == expected
