"""One of two processes that train a tiny model on half a batch each, by DDP or by FSDP2.

Usage: python sharded_loss.py RANK FOLDER     FOLDER is where the two meet.
Process 0 writes FOLDER/gradients.pt: loss parts, and the gradient of every parameter.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from cast_serve.trainer.distillation.teacher import Teacher
from cast_serve.trainer.head import put_loss_head
from cast_serve.trainer.objective import Objective

WORLD = 2


def tiny(seed: int, *, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def batch() -> torch.Tensor:
    return torch.randint(101, (4, 12), generator=torch.Generator().manual_seed(5))


def gradients(how: str, ids: torch.Tensor, *, tied: bool) -> dict[str, torch.Tensor]:
    """Loss parts and gradients of one step of `how`: "alone", "ddp" or "fsdp"."""
    model, twin = tiny(0, tied=tied), tiny(1, tied=tied)
    head = put_loss_head(model)
    put_loss_head(twin)
    wrapped = model
    if how == "ddp":
        wrapped = DistributedDataParallel(model)
    if how == "fsdp":
        # Its own unit: gathered for its forward pass alone, where it is not tied.
        units = [*model.model.layers] if tied else [*model.model.layers, head]
        for unit in units:
            fully_shard(unit)
        fully_shard(model)
    loss = Objective(eta=0.4)(wrapped, head, ids, Teacher(twin).targets(ids))
    loss.total.backward()
    found = {"": torch.stack((loss.total.detach(), loss.ce, loss.kl))}
    if how != "alone":
        dist.all_reduce(found[""])
        found[""] /= WORLD
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[name] = grad.full_tensor() if how == "fsdp" else grad
    return found


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD
    )
    mine = batch().chunk(WORLD)[rank]
    results = {
        (how, tied): gradients(how, mine, tied=tied)
        for how in ("ddp", "fsdp")
        for tied in (False, True)
    }
    if rank == 0:
        torch.save(results, folder / "gradients.pt")
    dist.barrier()
    dist.destroy_process_group()
