"""The plan of a run: what is sparsified, for how long, and whether weights travel far enough.

Travel (docs/method.md, AdamS, 3): over a run the decay carries a masked weight by about
sum_t lr_t * a_t. It must be a few times mean |masked w|, or the final prune removes weights that
still matter.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cast_serve.trainer.capacity import Memory, Shape, memory
from cast_serve.trainer.config import (
    DEFAULT_ADAMW_LR,
    HIGHEST_DEFAULT_LR,
    TRAVEL_ADVISED,
    TRAVEL_REFUSED,
    RunConfig,
)
from cast_serve.trainer.data import Corpus
from cast_serve.trainer.distillation.teacher_cache import cache_bytes
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.layers import LayerChoice
from cast_serve.trainer.masks import Progress, progress, weight_mask
from cast_serve.trainer.schedule import Schedule, whole_steps


@dataclass(frozen=True, kw_only=True)
class PlannedSource:
    """A source that is drawn by weight: its share of the training tokens, and its blocks."""

    name: str
    share: float
    blocks: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything the dry run prints. Counts are of parameters, tokens and bytes."""

    model_name: str
    layers: tuple[LayerChoice, ...]
    parameters: int
    sparse_parameters: int
    scales: int
    context: int
    train_blocks: int
    eval_blocks: int
    evaluated_on: str
    processes: int
    steps: int
    sequences_per_step: int
    lr: float
    lambda_: float | None
    magnitudes: Progress
    # None for a method other than cast, and where masked weights begin at zero.
    travel: float | None
    memory: Memory
    # Bytes on disk of a cached teacher.
    teacher_disk: int
    # Empty where all sources are read in full.
    sources: tuple[PlannedSource, ...] = ()

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.context

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def epochs(self) -> float:
        return self.tokens / (self.train_blocks * self.context)

    def epochs_of(self, source: PlannedSource) -> float:
        """How often the run reads a source that is drawn by weight."""
        return source.share * self.tokens / (source.blocks * self.context)

    @property
    def verdict(self) -> str:
        """ "ok", "short" (warn) or "refused"."""
        if self.travel is None:
            return "ok"
        # Not "<": a travel that is no number is refused as well.
        if not self.travel >= TRAVEL_REFUSED:
            return "refused"
        # A default rate is computed to reach the advised travel exactly, up to rounding.
        return "short" if self.travel < TRAVEL_ADVISED * (1 - 1e-9) else "ok"


def step_count(config: RunConfig, *, train_blocks: int, context: int, processes: int = 1) -> int:
    """Optimizer steps of the budget; a part of a step is rounded up.

    Raises:
        RunError: more than any run could take.
    """
    per_step = config.batch_size * config.gradient_accumulation * processes
    if config.steps is not None:
        return whole_steps(config.steps)
    if config.tokens is not None:
        return whole_steps(config.tokens / (per_step * context))
    epochs = 1.0 if config.epochs is None else config.epochs
    return whole_steps(epochs * train_blocks / per_step)


def token_budget(config: RunConfig, *, context: int, processes: int = 1) -> int | None:
    """Training tokens of a run in steps or tokens; None where it is counted in epochs."""
    if config.steps is None and config.tokens is None:
        return None
    steps = step_count(config, train_blocks=0, context=context, processes=processes)
    return steps * config.batch_size * config.gradient_accumulation * processes * context


def planned_sources(corpus: Corpus) -> tuple[PlannedSource, ...]:
    """The parts of a mixture; none without weights."""
    if corpus.shares is None:
        return ()
    return tuple(
        PlannedSource(name=name, share=share, blocks=len(part))
        for name, share, part in zip(corpus.names, corpus.shares, corpus.parts, strict=True)
    )


def make_plan(
    config: RunConfig,
    model: PreTrainedModel,
    layers: list[LayerChoice],
    *,
    context: int,
    train_blocks: int,
    eval_blocks: int,
    evaluated_on: str,
    lambda_: float | None,
    processes: int = 1,
    sources: tuple[PlannedSource, ...] = (),
) -> Plan:
    """The plan for `model`, dense and untouched, under `config`.

    Raises:
        RunError: the budget is more than any run could take, or there is no rate to train with.
    """
    schedule = Schedule(
        steps=step_count(config, train_blocks=train_blocks, context=context, processes=processes),
        warmup=config.warmup,
        floor=config.lr_floor,
        decay_ramp=config.decay_ramp,
        masked_rate=config.masked_rate,
    )
    sparse = [choice for choice in layers if choice.dense_because is None]
    magnitudes = progress(_masked_weights(model, sparse, config))
    travels = config.method == "cast" and config.pruned_first is None
    # One step without warm-up ends where it begins.
    if not (reach := schedule.reach()):
        raise RunError(
            "lr_floor: 0 is the rate of the run's only step; give more steps, or a floor above 0"
        )
    lr = config.lr if config.lr is not None else _default_lr(config, reach, magnitudes.masked)
    return Plan(
        model_name=type(model).__name__,
        layers=tuple(layers),
        parameters=sum(p.numel() for p in model.parameters()),
        sparse_parameters=sum(choice.numel for choice in sparse),
        scales=sum(c.rows * config.scaling_blocks for c in sparse) if config.learns_scales else 0,
        context=context,
        train_blocks=train_blocks,
        eval_blocks=eval_blocks,
        evaluated_on=evaluated_on,
        processes=processes,
        steps=schedule.steps,
        sequences_per_step=config.batch_size * config.gradient_accumulation * processes,
        lr=lr,
        lambda_=lambda_,
        magnitudes=magnitudes,
        travel=_travel(lr, reach, magnitudes.masked) if travels else None,
        memory=memory(Shape.of(model, config), config, context=context, processes=processes),
        sources=sources,
        teacher_disk=cache_bytes(
            model,
            config,
            context=context,
            sequences=min(
                train_blocks,
                schedule.steps * config.batch_size * config.gradient_accumulation * processes,
            ),
        ),
    )


def check_travel(plan: Plan, *, allowed: bool) -> str | None:
    """A warning to show, or None where weights travel far enough.

    Raises:
        RunError: the final prune would destroy the model, and `allowed` is not set.
    """
    if plan.travel is None or plan.verdict == "ok":
        return None
    found = (
        f"travel {plan.travel:.2f}: the decay moves a masked weight by {plan.travel:.2f} times "
        f"mean |masked w| = {plan.magnitudes.masked:.3g}"
    )
    remedy = f"train for more steps, or raise lr above {plan.lr:.3g} or masked_rate"
    if plan.verdict == "short":
        return f"{found}; below {TRAVEL_ADVISED:g} the final prune costs quality; {remedy}"
    if allowed:
        return f"{found}; below {TRAVEL_REFUSED:g} the final prune destroys the model; {remedy}"
    raise RunError(
        f"{found}, and below {TRAVEL_REFUSED:g} the final prune destroys the model; "
        f"{remedy}, or start all the same with --allow-short-travel"
    )


def _travel(lr: float, reach: float, masked: float) -> float:
    return lr * reach / masked if masked else math.inf


def _default_lr(config: RunConfig, reach: float, masked: float) -> float:
    if config.method != "cast":
        return DEFAULT_ADAMW_LR
    if not masked:
        raise RunError(
            "lr: must be given: the default brings masked weights to zero, and all of this model's "
            "are zero already; train the dense model that it was made from, or give lr"
        )
    return min(HIGHEST_DEFAULT_LR, TRAVEL_ADVISED * masked / reach)


def _masked_weights(
    model: PreTrainedModel, sparse: list[LayerChoice], config: RunConfig
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for choice in sparse:
        layer = model.get_submodule(choice.name)
        assert isinstance(layer.weight, torch.Tensor)
        input_dim = 0 if isinstance(layer, Conv1D) else 1
        yield layer.weight, weight_mask(layer.weight, config.nm, input_dim=input_dim)
