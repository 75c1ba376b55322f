"""The teacher: the dense model before training, frozen, and where it lives.

resident   a copy on the device, bf16 where the student computes in bf16
offload    the same, its decoder blocks in host memory (offload.py)
cached     nowhere: its most likely tokens were written to disk before (teacher_cache.py)
"""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.distillation.loss import Projection
from cast_serve.trainer.head import loss_head
from cast_serve.trainer.layers import compile_blocks, without_blocks
from cast_serve.trainer.objective import logits_of
from cast_serve.trainer.parallel import is_sharded, shard
from cast_serve.trainer.processes import Processes


class Teacher:
    """A frozen model in eval mode, asked for what the loss needs of it.

    All of it runs in `targets`. The head's weight is read after that as well, by the loss: whoever
    shards `model` shards its blocks and leaves the head whole.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.requires_grad_(False).eval()
        self._head = loss_head(model)

    @torch.no_grad()
    def targets(
        self, ids: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> Projection | torch.Tensor:
        """For every position of ids int64 [batch, context]: the last hidden states with the head,
        or the logits [batch * context, vocab] of a model that has no LossHead."""
        if self._head is None:
            return logits_of(self.model, ids, position_ids).flatten(0, 1)
        with self._head.doing(_hidden):
            hidden = logits_of(self.model, ids, position_ids)
        head = self._head
        return Projection(hidden_TH=hidden.flatten(0, 1), weight_VH=head.weight, bias_V=head.bias)


def make_teacher(model: PreTrainedModel, config: RunConfig, processes: Processes) -> Teacher:
    """A teacher from a copy of `model`, which is still the dense one, on any device."""
    offload = config.teacher == "offload"
    sharded = is_sharded(config, processes)
    # In bf16 a second model in fp32 need not fit, neither here nor on the device.
    dtype = torch.bfloat16 if config.compute == "bf16" else None
    twin = _twin(model, dtype, holds_weights=processes.is_first or not sharded)
    # An offloaded model waits for its blocks, and moves its parameters under the compiled code.
    if config.compile and not offload:
        compile_blocks(twin)
    if sharded:
        shard(twin, processes, offload=offload or config.offload, blocks_alone=True)
    elif offload:
        _offload_(twin, processes.device)
    else:
        twin.to(processes.device)  # type: ignore[arg-type]  # hidden by a decorator
    return Teacher(twin)


def _twin(
    model: PreTrainedModel, dtype: torch.dtype | None, *, holds_weights: bool
) -> PreTrainedModel:
    """A frozen copy of `model`, its parameters as `dtype` (None: as they are).

    Without `holds_weights` they hold nothing, and take no memory until they are written to. Buffers
    are copied as they are: rotary frequencies in bf16 put tokens in other places.
    """

    def twin_of(parameter: nn.Parameter) -> nn.Parameter:
        data = parameter.data
        twin = data.to(dtype, copy=True) if holds_weights else torch.empty_like(data, dtype=dtype)
        return nn.Parameter(twin, requires_grad=False)

    # deepcopy takes what the memo holds for done. Tied parameters are one.
    made = {id(parameter): twin_of(parameter) for parameter in model.parameters()}
    return copy.deepcopy(model, made)


def _offload_(model: PreTrainedModel, device: torch.device) -> None:
    """Blocks to the host, all else, as embedding and head, to `device`."""
    from cast_serve.trainer.offload import OffloadedBlocks

    with without_blocks(model) as blocks:
        model.to(device)  # type: ignore[arg-type]  # hidden by a decorator of transformers
    OffloadedBlocks(blocks, device)


def _hidden(
    hidden: torch.Tensor, _weight: torch.Tensor, _bias: torch.Tensor | None
) -> torch.Tensor:
    return hidden
