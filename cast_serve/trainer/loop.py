"""CastTrainer: transformers.Trainer with AdamS, the distillation loss and whole checkpoints.

The forward and backward passes are dense for the whole run; masks exist in the optimizer alone.
"""

import math
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback

from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.data import collate
from cast_serve.trainer.distill import Targets
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.head import loss_head
from cast_serve.trainer.layers import optimizer_groups
from cast_serve.trainer.masks import progress
from cast_serve.trainer.objective import Objective, logits_of
from cast_serve.trainer.optim import AdamS
from cast_serve.trainer.run_dir import STAGING, Fixed, checkpoints
from cast_serve.trainer.schedule import Schedule
from cast_serve.trainer.teacher import Teacher
from cast_serve.trainer.teacher_cache import CachedStream, batch_targets


class CastTrainer(Trainer):
    """Trains a model with scaled layers against a frozen teacher.

    The teacher is None with eta = 0, and where the stream is a CachedStream.
    """

    def __init__(
        self,
        config: RunConfig,
        fixed: Fixed,
        model: PreTrainedModel,
        teacher: Teacher | None,
        stream: Dataset[dict[str, torch.Tensor]],
        *,
        callbacks: list[TrainerCallback],
    ) -> None:
        arguments = training_arguments(config, fixed)
        schedule = Schedule(steps=fixed.steps, warmup=config.warmup, floor=config.lr_floor)
        self.config = config
        self.teacher = teacher
        self._cached = isinstance(stream, CachedStream)
        self._objective = Objective.of(config)
        self._head = loss_head(model)
        self._forward = torch.compile(logits_of) if config.compile else logits_of
        self.adams = AdamS(
            optimizer_groups(model),
            lr=fixed.lr,
            decay=fixed.lambda_,
            total_steps=fixed.steps,
            pattern=config.nm,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            mask_interval=config.mask_interval,
        )
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collate,
            train_dataset=stream,
            optimizers=(self.adams, LambdaLR(self.adams, schedule.factor())),
            callbacks=callbacks,
        )
        # compute_loss is a mean over one forward pass: the Trainer divides by their number a step.
        self.loss_is_scaled_for_ga = False
        self.remove_callback(ProgressCallback)
        self.add_callback(ProgressBar)
        self._parts = torch.zeros(2, device=arguments.device)
        self._parts_count = 0
        self._checkpoint_root: Path | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Eq. 13 on one batch; labels are the inputs shifted by one."""
        assert not return_outputs, "evaluation goes through evaluate.mean_loss"
        ids = inputs["input_ids"]
        known: Targets | None = batch_targets(inputs) if self._cached else None
        if self.teacher is not None:
            known = self.teacher.targets(ids)
        with self._autocast():
            loss = self._objective(model, self._head, ids, known, forward=self._forward)
        self._parts += torch.stack((loss.ce, loss.kl)).float()
        self._parts_count += 1
        return loss.total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add CAST's diagnostics to the entries of the training loss.

        Raises:
            RunError: the loss is no longer a number.
        """
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise RunError(
                    f"loss is {logs['loss']} at step {self.state.global_step}; lower lr or raise "
                    f"warmup; checkpoints before it are in {self.args.output_dir}"
                )
            logs |= self._diagnostics()
        super().log(logs, start_time)

    def _diagnostics(self) -> dict[str, float]:
        ce, kl = (self._parts / max(1, self._parts_count)).tolist()
        self._parts.zero_()
        self._parts_count = 0
        now = progress(self.adams.masked_weights())
        found = {
            "ce": ce,
            "sparse_weight_ratio": now.sparse_weight_ratio,
            "masked_magnitude": now.masked,
            "kept_magnitude": now.kept,
        }
        if self.config.eta > 0:
            found["kl"] = kl
        if self.adams.flips is not None:
            found["mask_flips"] = self.adams.flips
        return found

    def _autocast(self) -> AbstractContextManager[Any]:
        # Not TrainingArguments(bf16=True): accelerate would turn the logits to fp32 as a whole.
        if self.config.compute == "fp32":
            return nullcontext()
        return torch.autocast(self.args.device.type, torch.bfloat16)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write to a staging folder and rename: a folder named checkpoint-N is complete."""
        run_dir = self.config.run_dir
        staging = run_dir / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        self._checkpoint_root = staging
        super()._save_checkpoint(model, trial)
        self._checkpoint_root = None
        name = f"checkpoint-{self.state.global_step}"
        # Left by a run that was resumed from an earlier one: os.replace needs an empty target.
        shutil.rmtree(run_dir / name, ignore_errors=True)
        os.replace(staging / name, run_dir / name)
        staging.rmdir()
        for old in checkpoints(run_dir)[: -self.config.save_limit]:
            shutil.rmtree(old)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoint_root or self.args.output_dir)


class ProgressBar(ProgressCallback):
    """The Trainer's bar with the latest figures at its end, in place of a printed line each."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(
                f"loss {logs['loss']:.3f}  S {logs['sparse_weight_ratio']:.4f}  "
                f"lr {logs['learning_rate']:.1e}"
            )


def training_arguments(config: RunConfig, fixed: Fixed) -> TrainingArguments:
    """HF's arguments for a run on one process.

    Raises:
        RunError: the process was started as one of several.
    """
    arguments = TrainingArguments(
        output_dir=str(config.run_dir),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        max_steps=fixed.steps,
        # One "epoch" of BlockStream is the whole run, in its own order.
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        learning_rate=fixed.lr,
        max_grad_norm=config.clip,
        gradient_checkpointing=config.gradient_checkpointing,
        logging_steps=config.log_steps,
        logging_first_step=True,
        # A NaN must stop the run, not be averaged away in the log.
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_steps,
        report_to="none",
        remove_unused_columns=False,
        seed=config.seed,
        use_cpu=config.device == "cpu",
    )
    if arguments.world_size > 1:
        raise RunError(
            f"cast-train runs on one process, and was started as one of {arguments.world_size}; "
            "start it without torchrun or accelerate launch"
        )
    # The Trainer wraps the model in DataParallel where it sees several GPUs: take the first.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def tensorboard(config: RunConfig, *, first_step: int) -> TensorBoardCallback:
    """Logs to OUTPUT.run/logs; entries of an earlier try from `first_step` on are dropped."""
    from torch.utils.tensorboard import SummaryWriter

    folder = str(config.run_dir / "logs")
    return TensorBoardCallback(tb_writer=SummaryWriter(folder, purge_step=first_step))
