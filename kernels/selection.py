"""Selection: the plan of a layer, fixed at load.

In this order: CAST_SERVE_KERNEL, the table shipped for this GPU, the plan measured on this machine
before, one measured now. Nothing here runs while serving: the op looks M up in the plan.
"""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache

import torch

from cast_serve.envs import ForcedKernel, forced_kernel
from cast_serve.kernels import cache as disk
from cast_serve.kernels import shipped
from cast_serve.kernels.plan import BUCKETS, Plan
from cast_serve.kernels.prepare import Candidate, prepare_all
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.registry import KERNELS, NAMED
from cast_serve.kernels.spec import KernelSpec
from cast_serve.kernels.tune import TuningError, tune

logger = logging.getLogger(__name__)

# Buckets of a prefill larger than any that is measured: --max-num-batched-tokens goes this far.
_LARGER = (16384, 32768, 65536)

# What `warm_ahead` began and `warm` has not asked for. One after the other: each has threads.
_begun: dict[tuple[Problem, torch.device], Future[bool]] = {}
_beside = ThreadPoolExecutor(1, thread_name_prefix="cast-serve-kernels")


class NoKernel(ValueError):
    """No kernel supports the layer; the message has each one's reason."""


@cache
def plan_for(problem: Problem) -> Plan:
    """The plan of `problem`, on the current CUDA device where it has to be measured.

    Raises:
        TuningError: it has to be measured, and cannot be here and now.
        As `known_plan`.
    """
    plan = known_plan(problem)
    if plan is not None:
        return plan
    _refuse_capturing(problem)
    started = time.monotonic()
    plan = tune(problem, torch.device("cuda", torch.cuda.current_device()))
    disk.write(problem, plan)
    logger.info("timed kernels for %s in %.0f s", problem, time.monotonic() - started)
    return plan


@cache
def known_plan(problem: Problem) -> Plan | None:
    """The plan of `problem` if it is forced, shipped or was measured before; else None.

    Raises:
        NoKernel: no kernel supports it.
        ValueError: CAST_SERVE_KERNEL names a kernel or config that does not run it.
    """
    forced = forced_kernel()
    if forced is not None:
        return forced_plan(problem, forced)
    check_supported(problem)
    plan = shipped.find(problem)
    if plan is not None:
        refused = refusals(problem, plan)
        if not refused:
            return plan
        logger.warning("shipped plan for %s is not used, kernels are timed: %s", problem, refused)
    plan = disk.read(problem)
    if plan is not None:
        refused = refusals(problem, plan)
        if not refused:
            return plan
        logger.warning("%s is not used, kernels are timed: %s", disk.path_of(problem), refused)
    return None


@cache
def warm_ahead(problem: Problem, device: torch.device) -> None:
    """Begin with `warm(problem, device)` in a thread, while weights are read for it.

    `warm` waits for all that was begun, and raises what this raised. Nothing is begun that has to
    be timed: what else the GPU and the host do meanwhile would be in the times.
    """
    _begun[problem, device] = _beside.submit(_warm_if_known, problem, device)


def _warm_if_known(problem: Problem, device: torch.device) -> bool:
    # Each thread has a current device of its own, at first GPU 0, which may be another rank's.
    with torch.cuda.device(device):
        known = known_plan(problem) is not None
        if known:
            _warm(problem, device)
    return known


@cache
def warm(problem: Problem, device: torch.device) -> None:
    """Compile and create all that `plan_for(problem)` runs on `device`.

    After it the op compiles nothing, searches nothing, creates no handles and never synchronises,
    at any M up to 65536. Kernels compile in threads, or come from the user's cache.

    Raises:
        TuningError: a CUDA graph is being captured, or a kernel of the plan fails.
        As `plan_for`.
    """
    _refuse_capturing(problem)
    begun = _begun.pop((problem, device), None)
    # Kernels may be timed now, and weights laid out by a library that wants one thread at a time.
    wait(_begun.values())
    if begun is None or not begun.result():
        _warm(problem, device)


def _warm(problem: Problem, device: torch.device) -> None:
    with torch.cuda.device(device):
        plan = plan_for(problem)
        bounds = (row.max_M for row in plan.rows if row.max_M is not None)
        jobs: dict[Candidate, list[int]] = {}
        for M in sorted({*BUCKETS, *_LARGER, *bounds}):
            row = plan.choice(M)
            jobs.setdefault((row.kernel, row.config), []).append(M)
        for (kernel, config), error in prepare_all(problem, NAMED, jobs, device).items():
            if error is not None:
                raise TuningError(
                    f"{kernel} {config}, in the plan for {problem}, fails: {error}; another kernel "
                    f"can be named with CAST_SERVE_KERNEL ({', '.join(KERNELS)})"
                ) from error


def _refuse_capturing(problem: Problem) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise TuningError(
            f"kernels for {problem} are not ready and a CUDA graph is being captured: "
            "call cast_serve.kernels.selection.warm(problem, device) first"
        )


def check_supported(problem: Problem) -> None:
    """Raise NoKernel, with each kernel's reason, if no kernel supports `problem`."""
    lines = ""
    for name, spec in KERNELS.items():
        reason = spec.supports(problem)
        # The rest is not asked: cuSPARSELt would be loaded and tried for an answer of no use.
        if reason is None:
            return
        lines += f"\n  {name}: {reason}"
    raise NoKernel(f"no 2:4 kernel for {problem}{lines}")


def refusals(problem: Problem, plan: Plan) -> str:
    """Why kernels of `plan` do not run `problem` here; "" if all do.

    A library may be missing that the machine had where the plan was measured, and a file may name
    a config that there is not.
    """
    reasons: dict[str, None] = {}
    for row in plan.rows:
        spec = NAMED[row.kernel]
        reason = spec.supports(problem)
        if reason is None and row.config not in configs(problem, spec):
            reason = f"no config {row.config!r}"
        if reason:
            reasons[f"{spec.name}: {reason}"] = None
    return "; ".join(reasons)


def configs(problem: Problem, spec: KernelSpec) -> tuple[str, ...]:
    """The configs of a kernel that supports `problem`, for any M, best guesses first."""
    return tuple(dict.fromkeys(name for M in BUCKETS for name in spec.configs(problem, M)))


def forced_spec(forced: ForcedKernel) -> KernelSpec:
    """The kernel that is forced.

    Raises:
        ValueError: there is none of that name.
    """
    if forced.name not in NAMED:
        names = ", ".join(NAMED)
        raise ValueError(f"{forced}: no kernel {forced.name!r}; NAME is one of {names}")
    return NAMED[forced.name]


def forced_plan(problem: Problem, forced: ForcedKernel) -> Plan:
    """A plan of one kernel alone, with the config that is forced or its first guesses.

    Raises:
        ValueError: there is no such kernel, it does not support the problem, or has no such config
            for it.
    """
    spec = forced_spec(forced)
    reason = spec.supports(problem)
    if reason:
        raise ValueError(f"{forced} does not run {problem}: {reason}; unset it or name another")
    if forced.config is None:
        return Plan.of({M: (spec.name, spec.configs(problem, M)[0]) for M in BUCKETS})
    known = configs(problem, spec)
    if forced.config not in known:
        raise ValueError(f"{forced}: no such config for {problem}; there is {', '.join(known)}")
    return Plan.of(dict.fromkeys(BUCKETS, (spec.name, forced.config)))
