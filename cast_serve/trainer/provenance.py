"""cast.json: what made a checkpoint. Folder and file names only, no paths of a machine."""

from importlib.metadata import version
from typing import Any

from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.data import Corpus
from cast_serve.trainer.evaluation.mean_loss import to_perplexity
from cast_serve.trainer.plan import Plan
from cast_serve.trainer.run_dir import Fixed


def of_training(
    config: RunConfig, corpus: Corpus, plan: Plan, fixed: Fixed, *, before: float, after: float
) -> dict[str, Any]:
    """Of a model that was trained.

    Args:
        before, after: the prune, its mean loss in nats per token.
    """
    return {
        "method": config.method,
        **({"initial_mask": config.initial_mask} if config.method == "fixed-mask" else {}),
        **({"start": config.start} if config.method == "cast" else {}),
        **_source(config, corpus, fixed),
        "tokens": plan.tokens,
        "steps": fixed.steps,
        "batch": plan.sequences_per_step,
        "processes": plan.processes,
        "context": fixed.context,
        "lambda": fixed.lambda_,
        "lr": fixed.lr,
        "travel": plan.travel,
        "warmup": config.warmup,
        "lr_floor": config.lr_floor,
        "betas": [config.beta1, config.beta2],
        "eps": config.eps,
        "clip": config.clip,
        "eta": config.eta,
        "temperature": config.temperature,
        "scaling_blocks": config.scaling_blocks,
        "mask_interval": config.mask_interval,
        "decay_ramp": config.decay_ramp,
        "mask_metric": config.mask_metric,
        "masked_rate": config.masked_rate,
        "dense_rate": config.dense_rate,
        "second_moment": config.second_moment,
        "compute": config.compute,
        "teacher_top_k": config.teacher_top_k if config.teacher == "cached" else None,
        "document_attention": config.document_attention,
        "seed": config.seed,
        "evaluation": _evaluation(corpus, fixed, before_prune=before, after_prune=after),
        "versions": versions(),
    }


def of_one_shot(config: RunConfig, corpus: Corpus, fixed: Fixed, *, after: float) -> dict[str, Any]:
    """Of a model that was pruned by config.pruned_first and not trained.

    Args:
        after: its mean loss in nats per token.
    """
    return {
        "method": f"one-shot {config.pruned_first}",
        **_source(config, corpus, fixed),
        "tokens": 0,
        "context": fixed.context,
        "seed": config.seed,
        "evaluation": _evaluation(corpus, fixed, after_prune=after),
        "versions": versions(),
    }


def _source(config: RunConfig, corpus: Corpus, fixed: Fixed) -> dict[str, Any]:
    return {
        "teacher": config.model.resolve().name,
        "sparsity": config.pattern,
        "data": {
            "files": [source.name for source in config.data],
            **({"shares": corpus.shares} if corpus.shares else {}),
            **({"hub_commits": fixed.hub_commits} if fixed.hub_commits else {}),
            "sha256": fixed.data_sha256,
        },
    }


def _evaluation(corpus: Corpus, fixed: Fixed, **losses: float) -> dict[str, Any]:
    return {
        "on": corpus.evaluated_on,
        "tokens": corpus.evaluation.numel(),
        "context": fixed.context,
        "perplexity_dense": to_perplexity(fixed.dense_loss),
        **{f"perplexity_{name}": to_perplexity(loss) for name, loss in losses.items()},
    }


def versions(*more: str) -> dict[str, str]:
    """By name: those of the packages that decide what is written, and of `more` of them."""
    return {name: version(name) for name in ("cast-serve", "torch", "transformers", *more)}
