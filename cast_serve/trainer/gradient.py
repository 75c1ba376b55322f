"""The gradient of one optimizer step: forward and backward passes over its sequences.

A step reads `gradient_accumulation` batches in each of the processes, of `batch_size` sequences
each. Which sequences those are together depends on the step alone, so a run on two processes sees
what a run on one with twice the batch sees. Random numbers (dropout) depend on seed, step, batch
and process alone, so a resumed run draws what an uninterrupted one would have drawn.
"""

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from cast_serve.trainer.attention import attend_to_whole_blocks
from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.data import collate
from cast_serve.trainer.distillation.loss import Loss, Targets
from cast_serve.trainer.distillation.teacher import Teacher
from cast_serve.trainer.distillation.teacher_cache import CachedStream, batch_targets
from cast_serve.trainer.head import loss_head
from cast_serve.trainer.objective import Objective
from cast_serve.trainer.processes import Processes
from cast_serve.trainer.recorded import Pass, Recorded


class Gradient:
    """Accumulates the gradient of Eq. 13 in the parameters of `model`.

    The teacher is None with eta = 0, and where `stream` is a CachedStream.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        teacher: Teacher | None,
        stream: Dataset[dict[str, torch.Tensor]],
        processes: Processes,
    ) -> None:
        self.config = config
        self.model = model
        self.teacher = teacher
        self.stream = stream
        self.processes = processes
        self._objective = Objective.of(config)
        self._head = loss_head(model)
        self._cached = isinstance(stream, CachedStream)
        self._recorded: Recorded | None = None
        if config.cuda_graph:
            for one in (model, teacher.model if teacher else None):
                if isinstance(one, PreTrainedModel):
                    attend_to_whole_blocks(one)
            self._recorded = Recorded(partial(self._pass, eta=config.eta), [*model.parameters()])

    def accumulate(self, step: int, *, eta: float) -> torch.Tensor:
        """Run the passes of step `step`, counted from 0; returns [CE, KL], means of this process.

        Args:
            eta: weight of the KL; 0 leaves the teacher out.
        """
        self.model.train()
        run: Pass = partial(self._pass, eta=eta)
        if self._recorded is not None and eta == self.config.eta:
            run = self._recorded
        batches = self.config.gradient_accumulation
        parts = torch.zeros(2, device=self.processes.device)
        for batch in range(batches):
            place = (step * batches + batch) * self.processes.count + self.processes.rank
            torch.manual_seed(self.config.seed * 1_000_003 + place)
            with self._syncing(batch == batches - 1):
                parts += run(self._read(place)) / batches
        return parts

    def sequences(self, step: int, count: int) -> torch.Tensor:
        """The first `count` of step `step`, over all processes: ids [count, context]."""
        first = step * self.config.gradient_accumulation * self.processes.count
        first *= self.config.batch_size
        return torch.stack([self._item(first + index)["input_ids"] for index in range(count)])

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
        # Offloaded gradients are in host memory.
        return norm.to(self.processes.device)

    def _read(self, place: int) -> dict[str, torch.Tensor]:
        first = place * self.config.batch_size
        items = [self._item(first + index) for index in range(self.config.batch_size)]
        device = self.processes.device
        return {key: one.to(device, non_blocking=True) for key, one in collate(items).items()}

    def _item(self, index: int) -> dict[str, torch.Tensor]:
        # Beyond the end, where lambda is measured for a run shorter than its measurement.
        length = len(self.stream)  # type: ignore[arg-type]  # torch's Dataset does not say
        return self.stream[index % length]

    def _pass(self, batch: Mapping[str, torch.Tensor], *, eta: float) -> torch.Tensor:
        """Forward and backward; [CE, KL] of the batch."""
        loss = self._loss(batch, eta)
        (loss.total / self.config.gradient_accumulation).backward()
        return torch.stack((loss.ce, loss.kl))

    def _loss(self, batch: Mapping[str, torch.Tensor], eta: float) -> Loss:
        ids, positions = batch["input_ids"], batch.get("position_ids")
        known: Targets | None = None
        if eta and self._cached:
            known = batch_targets(batch)
        elif eta and self.teacher is not None:
            known = self.teacher.targets(ids, positions)
        objective = dataclasses.replace(self._objective, eta=eta)
        with self._autocast():
            return objective(self.model, self._head, ids, known, position_ids=positions)

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
