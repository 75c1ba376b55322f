"""The steps of a run: gradient, clipping, AdamS, and what is logged and saved on the way.

The forward and backward passes are dense for the whole run; masks exist in the optimizer alone.
"""

import math
import time

import torch

from cast_serve.trainer import checkpoint
from cast_serve.trainer.adams.optimizer import AdamS
from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.evaluation.mean_loss import mean_loss
from cast_serve.trainer.gradient import Gradient
from cast_serve.trainer.guard import Guard
from cast_serve.trainer.journal import Journal
from cast_serve.trainer.masks import progress
from cast_serve.trainer.methods.adamw import MaskedAdamW
from cast_serve.trainer.preview import preview
from cast_serve.trainer.run_dir import Fixed
from cast_serve.trainer.schedule import Schedule


class Training:
    """A model with scaled layers in training; `gradient` holds it, its teacher and its data."""

    def __init__(
        self,
        config: RunConfig,
        fixed: Fixed,
        gradient: Gradient,
        optimizer: AdamS | MaskedAdamW,
        evaluation: torch.Tensor,
        *,
        guess: float,
    ) -> None:
        """
        Args:
            evaluation: int [windows, context], looked at every `eval_steps`.
            guess: nats per token of a model that guesses, ln(vocabulary).
        """
        self.config = config
        self.fixed = fixed
        self.gradient = gradient
        self.processes = gradient.processes
        self.schedule = Schedule(
            steps=fixed.steps,
            warmup=config.warmup,
            floor=config.lr_floor,
            decay_ramp=config.decay_ramp,
            masked_rate=config.masked_rate,
        )
        self.optimizer = optimizer
        self.evaluation = evaluation
        self.guard = Guard(self.processes, limit=config.loss_limit or guess + 1)
        # Sums of CE, KL and gradient norm since the last entry.
        self._sums = torch.zeros(3, device=self.processes.device)
        self._logged = 0
        self._since = time.perf_counter()

    def run(self, done: int, journal: Journal | None) -> None:
        """The steps after `done`; `journal` in the first process alone.

        Raises:
            RunError: the loss exploded, or a checkpoint cannot be written.
        """
        config, steps = self.config, self.fixed.steps
        if done == 0 and config.eval_steps is not None:
            self._evaluate(0, journal)
        self._logged, self._since = done, time.perf_counter()
        for step in range(done + 1, steps + 1):
            self._step(step)
            last = step == steps
            logs = step == 1 or last or step % config.log_steps == 0
            evaluates = self._evaluation_is_due(step)
            saves = last or step % config.save_steps == 0
            if logs or evaluates or saves:
                # What is saved must be worth resuming from.
                self.guard.check(config.run_dir, step)
            if logs:
                self._log(step, journal)
            if evaluates:
                self._evaluate(step, journal)
            if saves:
                self.guard.check_update(config.run_dir, step, self._loss_ahead(step))
                checkpoint.save(
                    config.run_dir,
                    step,
                    self.gradient.model,
                    self.optimizer,
                    self.processes,
                    keep=config.save_limit,
                )
            if journal is not None:
                journal.advance(step)

    def _step(self, step: int) -> None:
        rate = self.fixed.lr * self.schedule.rate(step)
        for group in self.optimizer.param_groups:
            stays_dense = group["input_dim"] is None
            group["lr"] = rate * self.config.dense_rate if stays_dense else rate
        eta = self.config.eta
        parts = self.gradient.accumulate(step - 1, eta=eta)
        norm = self.gradient.clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._sums += torch.cat((parts, norm.reshape(1)))
        self.guard.see((1 - eta) * parts[0] + eta * parts[1], parts[0], norm)

    def _loss_ahead(self, step: int) -> float:
        """Cross-entropy, in nats per token, of what the step after `step` begins with."""
        return mean_loss(
            self.gradient.model,
            self.gradient.sequences(step, self.config.batch_size * self.processes.count),
            batch_size=self.config.batch_size,
            processes=self.processes,
        )

    def _log(self, step: int, journal: Journal | None) -> None:
        count = step - self._logged
        means = self.processes.sum(self._sums) / (count * self.processes.count)
        ce, kl, norm = means.tolist()
        self._sums.zero_()
        pairs = list(self.optimizer.masked_weights())
        # The figures above have been read, so the device is done with these steps.
        seconds = time.perf_counter() - self._since
        tokens = count * self.fixed.sequences_per_step * self.fixed.context
        eta = self.config.eta
        figures = {
            "loss": eta * kl + (1 - eta) * ce,
            "ce": ce,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
            "tokens": step * self.fixed.sequences_per_step * self.fixed.context,
            "tokens_per_s": tokens / seconds,
        }
        if eta:
            figures["kl"] = kl
        if pairs:
            now = progress(pairs)
            figures["sparse_weight_ratio"] = now.sparse_weight_ratio
            figures["masked_magnitude"] = now.masked
            figures["kept_magnitude"] = now.kept
        if self.optimizer.flips is not None:
            figures["mask_flips"] = self.optimizer.flips
        if journal is not None:
            journal.write(step, figures)
        self._logged, self._since = step, time.perf_counter()

    def _evaluation_is_due(self, step: int) -> bool:
        every = self.config.eval_steps
        if every is None:
            return False
        if every < 1:
            every = math.ceil(every * self.fixed.steps)
        return step % int(every) == 0

    def _evaluate(self, step: int, journal: Journal | None) -> None:
        """Log preview() of the model after `step`; training goes on as if it had not been."""
        begun = time.perf_counter()
        figures = preview(
            self.gradient.model,
            self.evaluation,
            self.config.nm,
            batch_size=self.config.batch_size,
            processes=self.processes,
        )
        if journal is not None:
            journal.write(step, figures)
        # Not a part of the training's speed.
        self._since += time.perf_counter() - begun
