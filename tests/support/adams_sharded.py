"""AdamS over 25 steps of given gradients, on one process or on the shards of several.

Usage: torchrun --nproc-per-node 2 adams_sharded.py FOLDER     writes FOLDER/rank-R.pt
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from cast_serve.trainer.adams.optimizer import AdamS
from cast_serve.trainer.config import Pattern
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.masks import progress

STEPS, SAVED_AT = 25, 13
# Shape and input dimension: rows that divide by two, that do not, fewer rows than ranks, a Conv1D
# whose shards hold whole groups, a norm that stays dense.
WEIGHTS: dict[str, tuple[tuple[int, ...], int | None]] = {
    "even": ((6, 16), 1),
    "uneven": ((5, 8), 1),
    "one_row": ((1, 12), 1),
    "conv": ((16, 6), 0),
    "norm": ((7,), None),
}


def build() -> nn.Module:
    """A module that holds the weights; small ones, so that masks change on the way."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Module()
    for name, (shape, _) in WEIGHTS.items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator) * 0.1))
    return model


def make_optimizer(model: nn.Module) -> AdamS:
    groups = [
        {"params": [model.get_parameter(n) for n in names], "param_names": names, "input_dim": dim}
        for dim in (1, 0, None)
        if (names := [name for name, (_, own) in WEIGHTS.items() if own == dim])
    ]
    return AdamS(
        groups,
        lr=3e-2,
        decay=0.4,
        total_steps=STEPS,
        pattern=Pattern(kept=2, group=4),
        mask_interval=3,
    )


def take_steps(
    model: nn.Module, optimizer: AdamS, steps: range, *, place: Callable
) -> list[tuple[object, ...]]:
    """The diagnostics after each step; gradients depend on the step alone."""
    seen = []
    for step in steps:
        generator = torch.Generator().manual_seed(1 + step)
        for name, (shape, _) in WEIGHTS.items():
            parameter = model.get_parameter(name)
            parameter.grad = place(torch.randn(shape, generator=generator), parameter)
        optimizer.step()
        now = progress(optimizer.masked_weights())
        seen.append((optimizer.flips, now.sparse_weight_ratio, now.masked, now.kept))
    return seen


def whole_state(model: nn.Module, optimizer: AdamS) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and optimizer state by name, gathered."""
    found = {}
    for name in WEIGHTS:
        parameter = model.get_parameter(name)
        tensors = {"weight": parameter.detach()} | dict(optimizer.state[parameter])
        found[name] = {
            key: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for key, tensor in tensors.items()
        }
    return found


def _sharded(mesh: DeviceMesh) -> nn.Module:
    model = build()
    fully_shard(model, mesh=mesh)
    return model


def _distribute(grad: torch.Tensor, parameter: DTensor) -> DTensor:
    return distribute_tensor(grad, parameter.device_mesh, parameter.placements)


def _refusal(mesh: DeviceMesh) -> str:
    """Of a Conv1D [12, 4]: two ranks hold six rows each."""
    weight = nn.Parameter(distribute_tensor(torch.ones(12, 4), mesh, [Shard(0)]))
    group = {"params": [weight], "param_names": ["h.0.c_fc.weight"], "input_dim": 0}
    optimizer = AdamS([group], lr=1, decay=1, total_steps=1, pattern=Pattern(kept=2, group=4))
    weight.grad = torch.zeros_like(weight)
    try:
        optimizer.step()
    except RunError as error:
        return str(error)
    return "nothing was refused"


def _save_and_load(folder: Path, model: nn.Module, optimizer: AdamS) -> AdamS:
    """Another optimizer of `model` with the state of this one, by way of accelerate's files."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import load_fsdp_optimizer, save_fsdp_optimizer

    accelerator, plugin = Accelerator(cpu=True), FullyShardedDataParallelPlugin(fsdp_version=2)
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, str(folder))
    other = make_optimizer(model)
    for parameter in model.parameters():
        parameter.grad = None
    load_fsdp_optimizer(plugin, accelerator, other, model, str(folder))
    return other


def _switched(mesh: DeviceMesh) -> dict[str, dict[str, torch.Tensor]]:
    """State after a run of an optimizer whose parameters accelerate swaps for sharded ones."""
    from accelerate.utils import fsdp2_switch_optimizer_parameters

    model = build()
    optimizer = make_optimizer(model)
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    fully_shard(model, mesh=mesh)
    for group in optimizer.param_groups:
        for place, name in enumerate(group["param_names"]):
            # As accelerate does: fully_shard leaves the old parameter without memory.
            group["params"][place] = torch.empty(1)
            group["params"][place].data_ptr = addresses[name]
    sharded = dict(model.named_parameters())
    mapping = {address: sharded[name] for name, address in addresses.items()}
    fsdp2_switch_optimizer_parameters(optimizer, mapping)
    take_steps(model, optimizer, range(STEPS), place=_distribute)
    return whole_state(model, optimizer)


def main() -> None:
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    model = _sharded(mesh)
    optimizer = make_optimizer(model)
    seen = take_steps(model, optimizer, range(SAVED_AT), place=_distribute)
    optimizer = _save_and_load(folder, model, optimizer)
    masks = [mask.to_local().dtype for _, mask in optimizer.masked_weights()]
    seen += take_steps(model, optimizer, range(SAVED_AT, STEPS), place=_distribute)
    full = StateDictOptions(full_state_dict=True)
    found = {
        "rows": {name: len(p.to_local()) for name, p in model.named_parameters()},
        "seen": seen,
        "state": whole_state(model, optimizer),
        "mask_dtypes": masks,
        "state_dict": get_optimizer_state_dict(model, optimizer, options=full),
        "switched": _switched(mesh),
        "refusal": _refusal(mesh),
    }
    torch.save(found, folder / f"rank-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
