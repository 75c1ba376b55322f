"""What runs a sparse layer once it is loaded: the plan of its shape, on the device it is on."""

import json

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform

from cast_serve.config import CastConfig
from cast_serve.envs import ForcedKernel, forced_kernel
from cast_serve.kernels.op import REFERENCE_PLAN
from cast_serve.kernels.plan import Plan
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.registry import REFERENCE
from cast_serve.kernels.selection import NoKernel, plan_for, warm

logger = init_logger(__name__)


def plan_layer(values: torch.Tensor, config: CastConfig) -> Plan | None:
    """The plan by which the op runs a layer, its kernels made ready; None: it is to run dense.

    Args:
        values: [N, K/2] bf16 or fp16, of this rank, on the device that runs them.
        config: notes the shapes that the log has had.

    Raises:
        ValueError: CAST_SERVE_KERNEL names a kernel that does not run it.
    """
    if current_platform.is_cpu():
        # Unless told otherwise, vLLM's own linear: it is faster than the reference.
        forced = forced_kernel()
        plan = None if forced is None else forced_on_cpu(forced)
    elif current_platform.is_cuda():
        plan = _plan_on_gpu(values)
    else:
        logger.warning_once("2:4 layers run dense: there is no 2:4 kernel for this device")
        plan = None
    if plan is not None:
        _log(values, plan, config)
    return plan


def forced_on_cpu(forced: ForcedKernel) -> Plan:
    """The plan of every layer on a CPU where CAST_SERVE_KERNEL is set.

    Raises:
        ValueError: it names what needs a GPU, or a config that there is not.
    """
    if forced.name != REFERENCE.name:
        raise ValueError(f"{forced} needs a GPU; on a CPU there is {REFERENCE.name}")
    (row,) = REFERENCE_PLAN.rows
    if forced.config not in (None, row.config):
        raise ValueError(f"{forced}: no such config; there is {row.config}")
    return REFERENCE_PLAN


def _plan_on_gpu(values: torch.Tensor) -> Plan | None:
    rows, half = values.shape
    problem = Problem.on(values.device, N=rows, K=2 * half, dtype=values.dtype)
    try:
        warm(problem, values.device)
    except NoKernel as error:
        logger.warning_once("2:4 layers run dense: %s", str(error))
        return None
    return plan_for(problem)


def _log(values: torch.Tensor, plan: Plan, config: CastConfig) -> None:
    # Not info_once: that is once a process, which may load several models.
    rows, columns = shape = values.shape[0], 2 * values.shape[1]
    if shape not in config.logged_shapes:
        config.logged_shapes.add(shape)
        rows_of_plan = json.dumps(plan.to_json())
        logger.info("2:4 layers [%d, %d] stay packed: %s", rows, columns, rows_of_plan)
