"""Preparing kernels for many configs at once: compilers in threads, libraries one by one."""

import functools
import importlib.util
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from cast_serve.kernels import cusparselt
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.spec import KernelSpec

Candidate = tuple[str, str]  # kernel, config

# Neither NVRTC nor ptxas hold the GIL. Triton's front end does, so more threads gain nothing.
MAX_THREADS = 16

# Compiles nothing, and a library's handle is for one thread at a time.
SERIAL = frozenset({cusparselt.SPEC.name})

# Nothing can be prepared or run after one of these: memory is short, or the CUDA context is gone.
FATAL = (torch.OutOfMemoryError, torch.AcceleratorError)


def prepare_all(
    problem: Problem,
    specs: Mapping[str, KernelSpec],
    jobs: Mapping[Candidate, Sequence[int]],
    device: torch.device,
    *,
    until: float = float("inf"),
) -> dict[Candidate, Exception | None]:
    """Prepare candidates, each for the M of its job; `device` is the current one.

    Args:
        specs: by name, of the kernels of all jobs.
        until: of time.monotonic(): what has not begun by then is left out of the result.

    Returns:
        In the order of `jobs`: None, or why a candidate cannot be prepared.

    Raises:
        One of FATAL.
    """
    module = torch.get_device_module(device)
    ends: dict[Candidate, Exception | None] = {}

    def enter() -> None:
        # A thread starts without a CUDA context; waiting for the device makes one current.
        module.set_device(device)
        module.synchronize(device)

    def attempt(candidate: Candidate) -> None:
        if time.monotonic() > until:
            return
        name, config = candidate
        try:
            for M in jobs[candidate]:
                specs[name].prepare(problem, config, M)
            ends[candidate] = None
        except FATAL:
            raise
        except failures() as error:
            ends[candidate] = error

    parallel = [candidate for candidate in jobs if candidate[0] not in SERIAL]
    with ThreadPoolExecutor(_threads(), initializer=enter) as pool:
        # A list: it raises what a thread raised.
        list(pool.map(attempt, parallel))
    for candidate in jobs:
        if candidate[0] in SERIAL:
            attempt(candidate)
    return {candidate: ends[candidate] for candidate in jobs if candidate in ends}


@functools.cache
def failures() -> tuple[type[Exception], ...]:
    """What a kernel raises that a GPU, driver or compiler does not take, or has no compiler for."""
    if importlib.util.find_spec("triton") is None:
        return RuntimeError, ImportError
    from triton.errors import TritonError

    return RuntimeError, ImportError, TritonError


def _threads() -> int:
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))
