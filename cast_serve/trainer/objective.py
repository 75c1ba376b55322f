"""The loss of a batch: a model's forward pass with Eq. 13 at its end."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.distillation.loss import (
    IGNORED,
    Loss,
    Targets,
    distillation_loss,
    linear_distillation_loss,
)
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.head import LossHead, put_loss_head, returns_its_head

LinearLoss = Callable[..., Loss]


def logits_of(
    model: nn.Module, ids: torch.Tensor, position_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """[batch, context, vocab], or what the model's LossHead returns instead."""
    places = {} if position_ids is None else {"position_ids": position_ids}
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, **places).logits
    return logits


def next_tokens(ids: torch.Tensor) -> torch.Tensor:
    """Labels [batch * context]: each token's successor; the last of a sequence has none."""
    return nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED).flatten()


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Eq. 13 with a weight, a temperature, and a way to compute it.

    Attributes:
        compiled: chunks of the loss go through torch.compile.
        linear_loss: takes what linear_distillation_loss takes.
    """

    eta: float
    temperature: float = 1.0
    compiled: bool = False
    linear_loss: LinearLoss = linear_distillation_loss

    @classmethod
    def of(cls, config: RunConfig) -> "Objective":
        loss: LinearLoss = linear_distillation_loss
        if config.loss == "liger":
            from cast_serve.trainer.distillation.liger import liger_distillation_loss

            loss = liger_distillation_loss
        return cls(
            eta=config.eta,
            temperature=config.temperature,
            compiled=config.compile,
            linear_loss=loss,
        )

    def __call__(
        self,
        model: nn.Module,
        head: LossHead | None,
        ids: torch.Tensor,
        teacher: Targets | None,
        *,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> Loss:
        """The loss of `model`, which may be wrapped by DDP or FSDP, on ids int64 [batch, context].

        Args:
            head: the model's own; None makes its logits whole.
            teacher: for all positions, the last of each sequence included.
            labels: int64 [batch * context] as of `next_tokens`, which is the default.
        """
        labels = next_tokens(ids) if labels is None else labels
        options: dict[str, Any] = {
            "eta": self.eta,
            "temperature": self.temperature,
            "compiled": self.compiled,
        }
        if head is None:
            logits = logits_of(model, ids, position_ids).flatten(0, 1)
            return distillation_loss(logits, teacher, labels, **options)

        def work(
            hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
        ) -> torch.Tensor:
            found = self.linear_loss(hidden.flatten(0, 1), weight, bias, teacher, labels, **options)
            return torch.stack((found.total, found.ce, found.kl))

        with head.doing(work):
            total, ce, kl = logits_of(model, ids, position_ids).unbind()
        return Loss(total=total, ce=ce.detach(), kl=kl.detach())


def prepare_head(model: PreTrainedModel, config: RunConfig) -> str | None:
    """Put a LossHead into `model` as config.loss says; a line to show where it cannot be had.

    Raises:
        RunError: config.loss asks for it all the same.
    """
    if config.loss == "logits":
        return None
    if returns_its_head(model):
        put_loss_head(model)
        return None
    reason = f"{type(model).__name__} does not return the plain output of a linear head"
    if config.loss != "auto":
        raise RunError(f"loss: {reason}, so {config.loss} is not possible; use auto")
    return f"loss: {reason}: its logits are kept whole, [tokens, vocab]"
