"""Plans measured on this machine, kept under the user's cache folder.

One file a shape, `<user_cache>/plans/<gpu>-<versions>/<N>x<K>-<dtype>.json`, written whole and
renamed into place: tensor-parallel ranks that measure the same shape overwrite each other with
equally good plans. `<versions>` is a hash of everything that a timing depends on.
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
import re
from pathlib import Path

import torch

from cast_serve.kernels import cusparselt_abi
from cast_serve.kernels.plan import Plan
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.user_cache import user_cache, write_whole

logger = logging.getLogger(__name__)


@functools.cache
def versions() -> dict[str, str]:
    """What timings depend on beside the GPU: PyTorch, CUDA, Triton, cuSPARSELt and our kernels."""
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parent.iterdir()):
        if path.suffix in (".py", ".cu", ".cuh"):
            sources.update(path.read_bytes())
    return {
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "triton": _triton_version(),
        "cusparselt": cusparselt_abi.loaded_version(),
        "kernels": sources.hexdigest()[:16],
    }


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def path_of(problem: Problem) -> Path:
    gpu = re.sub(r"[^a-z0-9]+", "-", problem.gpu.lower()).strip("-")
    key = hashlib.sha256(json.dumps(versions()).encode()).hexdigest()[:12]
    name = f"{problem.N}x{problem.K}-{problem.dtype_name}.json"
    return user_cache() / "plans" / f"{gpu}-{key}" / name


def read(problem: Problem) -> Plan | None:
    """The cached plan; None if there is none. A file that cannot be used is named in a warning."""
    path = path_of(problem)
    try:
        stored = json.loads(path.read_text())
        if {**stored, "plan": None} != {**_key(problem), "plan": None}:
            raise ValueError("it is of another GPU, shape or version")
        return Plan.from_json(stored.get("plan"))
    except FileNotFoundError:
        return None
    # TypeError: JSON, but no object or no list where one is expected.
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s is not used, and measured again: %s", path, error)
        return None


def write(problem: Problem, plan: Plan) -> None:
    """Keep `plan`. Where that is impossible a warning says why: the next start measures again."""
    path = path_of(problem)
    text = json.dumps({**_key(problem), "plan": plan.to_json()}, indent=1)
    try:
        write_whole(path, text.encode())
    except OSError as error:
        logger.warning("kernels are measured again at every start: %s: %s", path, error)


def _key(problem: Problem) -> dict[str, object]:
    return {
        "gpu": problem.gpu,
        "N": problem.N,
        "K": problem.K,
        "dtype": problem.dtype_name,
        "versions": versions(),
    }
