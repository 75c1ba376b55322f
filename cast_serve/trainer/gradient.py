"""The gradient of one optimizer step: forward and backward passes over its sequences.

A step reads `gradient_accumulation` batches in each of the processes, of `batch_size` sequences
each. Which sequences those are together depends on the step alone, so a run on two processes sees
what a run on one with twice the batch sees. Random numbers (dropout) depend on seed, step, batch
and process alone, so a resumed run draws what an uninterrupted one would have drawn.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.data import BlockStream, collate
from cast_serve.trainer.distill import distillation_loss
from cast_serve.trainer.processes import Processes


class Gradient:
    """Accumulates the gradient of Eq. 13 in the parameters of `model`."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        teacher: PreTrainedModel | None,
        stream: BlockStream,
        processes: Processes,
    ) -> None:
        self.config = config
        self.model = model
        self.teacher = teacher
        self.stream = stream
        self.processes = processes

    def accumulate(self, step: int, *, eta: float) -> torch.Tensor:
        """Run the passes of step `step`, counted from 0; returns [CE, KL], means of this process.

        Args:
            eta: weight of the KL; 0 leaves the teacher out.
        """
        self.model.train()
        batches = self.config.gradient_accumulation
        parts = torch.zeros(2, device=self.processes.device)
        for batch in range(batches):
            place = (step * batches + batch) * self.processes.count + self.processes.rank
            torch.manual_seed(self.config.seed * 1_000_003 + place)
            with self._syncing(batch == batches - 1):
                loss, found = self._loss(eta, **self._read(place))
                (loss / batches).backward()
            parts += found / batches
        return parts

    def clip(self) -> torch.Tensor:
        """Scale the gradient to `clip` where it is longer; returns its norm before."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm(grads)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self.config.clip:
            clip_grads_with_norm_(
                (p for p in self.model.parameters() if p.grad is not None), self.config.clip, norm
            )
        return norm

    def _read(self, place: int) -> dict[str, torch.Tensor]:
        first = place * self.config.batch_size
        # Beyond the end, where lambda is measured for a run shorter than its measurement.
        items = [
            self.stream[(first + index) % len(self.stream)]
            for index in range(self.config.batch_size)
        ]
        device = self.processes.device
        return {key: one.to(device, non_blocking=True) for key, one in collate(items).items()}

    def _loss(self, eta: float, **inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            inputs: input_ids [batch, context], and position_ids where documents are apart.
        """
        teacher_logits = None
        if eta and self.teacher is not None:
            with torch.no_grad():
                teacher_logits = _logits(self.teacher, **inputs)
        with self._autocast():
            logits = _logits(self.model, **inputs)
        loss = distillation_loss(
            logits,
            teacher_logits,
            inputs["input_ids"][:, 1:].flatten(),
            eta=eta,
            temperature=self.config.temperature,
        )
        return loss.total, torch.stack((loss.ce, loss.kl)).float()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.compute == "fp32":
            return nullcontext()
        return torch.autocast(self.processes.device.type, torch.bfloat16)

    def _syncing(self, last: bool) -> AbstractContextManager[Any]:
        # DDP adds gradients up over processes once a step. FSDP2 does so in every pass: whole
        # gradients between passes would take the memory that sharding saves.
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()


def _logits(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """[batch * (context-1), vocab] logits of the positions that have a next token."""
    logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits[:, :-1].flatten(0, 1)
