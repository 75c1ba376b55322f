"""How a model is spread over the processes of a run.

    ddp    every process holds the whole model; gradients are averaged (DistributedDataParallel)
    fsdp   every process holds a slice of every parameter and of the optimizer's state; a decoder
           block is put together when its turn comes (FSDP2, `fully_shard`)

FSDP2 cuts along dimension 0. A weight [N, K] keeps its groups along K whole that way; GPT-2's
Conv1D weight [K, N] is cut along dimension 1 instead. Parameters, and so the sums of gradients, are
fp32 whatever the forward pass computes in: autocast does the rest, as it does in one process.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.layers import ScaledConv1D, decoder_blocks, without_blocks
from cast_serve.trainer.processes import Processes

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def is_sharded(config: RunConfig, processes: Processes) -> bool:
    """Whether every process holds a slice of the model; one alone holds all of it."""
    return config.parallel == "fsdp" and processes.count > 1


def replicate(model: nn.Module, processes: Processes) -> nn.Module:
    """`model` on this process' device, as DistributedDataParallel where there are several."""
    model.to(processes.device)
    if processes.count == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    devices = [processes.device] if processes.device.type == "cuda" else None
    # Buffers, such as rotary frequencies, never change.
    return DistributedDataParallel(
        model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def shard(model: PreTrainedModel, processes: Processes, *, offload: bool = False) -> None:
    """Spread `model` over all processes, in place; its weights are those of the first one.

    Args:
        offload: the slices stay in host memory, and so does what is made of them.

    Raises:
        RunError: a Conv1D weight whose N is no multiple of the number of processes.
    """
    weights: dict[str, Any] = model.state_dict() if processes.is_first else {}
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    options = _options(mesh, processes, offload=offload)
    options["shard_placement_fn"] = _placement(model, processes.count)
    for block in decoder_blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **options)
    set_model_state_dict(model, weights, options=_FROM_FIRST)


def shard_blocks(model: PreTrainedModel, processes: Processes, *, offload: bool) -> None:
    """As shard, for a frozen model: what is outside its blocks stays whole on every device."""
    weights: dict[str, Any] = model.state_dict() if processes.is_first else {}
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for block in decoder_blocks(model):
        fully_shard(block, **_options(mesh, processes, offload=offload))
    # All weights arrive on one device: where the blocks are.
    if offload:
        set_model_state_dict(model, weights, options=_FROM_FIRST)
    with without_blocks(model):
        model.to(processes.device)  # type: ignore[arg-type]  # hidden by a decorator
    if not offload:
        set_model_state_dict(model, weights, options=_FROM_FIRST)


def _options(mesh: DeviceMesh, processes: Processes, *, offload: bool) -> dict[str, Any]:
    # True, also for a unit that is in no other one: else it stays whole after a forward pass alone,
    # as evaluation and a teacher's are, and the optimizer would be given whole parameters.
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=processes.device.type == "cuda")
    return options


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the whole model on the CPU; every process must ask, the first gets it."""
    weights: Any = get_model_state_dict(model, options=_FULL)
    return weights  # type: ignore[no-any-return]


def _placement(model: nn.Module, count: int):  # type: ignore[no-untyped-def]
    columns: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, ScaledConv1D):
            columns[id(module.weight)] = name

    def place(parameter: nn.Parameter) -> Shard | None:
        name = columns.get(id(parameter))
        if name is None:
            return None
        if parameter.shape[1] % count:
            raise RunError(
                f"parallel: {name}.weight {list(parameter.shape)} cannot be cut into {count} along "
                "its outputs; use a number of processes that divides them, or parallel=ddp"
            )
        return Shard(1)

    return place
