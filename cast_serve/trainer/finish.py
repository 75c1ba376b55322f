"""The end of a run: the trained model is evaluated, pruned, folded, evaluated again and written."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import nn

from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.data import Corpus
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.evaluate import mean_loss, to_perplexity
from cast_serve.trainer.export import dtype_name, prune_and_fold_, publish, write_training_form
from cast_serve.trainer.journal import read_history
from cast_serve.trainer.layers import scaled_layers
from cast_serve.trainer.parallel import whole_weights
from cast_serve.trainer.plan import Plan
from cast_serve.trainer.plots import write_plots
from cast_serve.trainer.processes import Processes
from cast_serve.trainer.run_dir import Fixed
from cast_serve.trainer.source import Source

_TRAINING_FORM = "training-form"


def finish(
    config: RunConfig,
    source: Source,
    model: nn.Module,
    corpus: Corpus,
    plan: Plan,
    fixed: Fixed,
    console: Console,
    processes: Processes,
) -> None:
    """Evaluate, prune, fold, evaluate again, export and plot; every process must call it.

    Args:
        model: source.model, trained, as it is spread over the processes.

    Raises:
        RunError: the output cannot be written.
    """
    before = mean_loss(model, corpus.evaluation, processes=processes)
    if config.mask_metric != "magnitude":
        # Who prunes what is written sees |w| alone.
        for _, layer in scaled_layers(model):
            layer.prune_(config.nm)
    weights = whole_weights(source.model)
    processes.on_first(lambda: _write_training_form(config, source, plan, weights))
    prune_and_fold_(model, config)
    after = mean_loss(model, corpus.evaluation, processes=processes)
    weights = {} if config.converts else whole_weights(source.model)
    evaluation = {
        "on": corpus.evaluated_on,
        "tokens": corpus.evaluation.numel(),
        "context": plan.context,
        "perplexity_dense": to_perplexity(fixed.dense_loss),
        "perplexity_before_prune": to_perplexity(before),
        "perplexity_after_prune": to_perplexity(after),
    }
    provenance = _provenance(config, corpus, plan, fixed, evaluation)
    processes.on_first(lambda: _export(config, source, weights, provenance))
    dtype = dtype_name(source.output_dtype(config.dtype))
    stored = "float32" if config.export_form == "training" else dtype
    for key in ("perplexity_dense", "perplexity_before_prune", "perplexity_after_prune"):
        label = key.removeprefix("perplexity_").replace("_", " ")
        console.print(
            f"perplexity {label}: {evaluation[key]:.3f} ({corpus.evaluated_on})", markup=False
        )
    console.print(f"wrote {config.output} ({config.export_form}, {stored})", markup=False)
    console.print(f"logs and plots: {config.run_dir}", markup=False)


def _write_training_form(
    config: RunConfig, source: Source, plan: Plan, weights: dict[str, torch.Tensor]
) -> None:
    """Write the unpruned model, of which all forms of output are made."""
    target = config.run_dir / _TRAINING_FORM
    with _output_errors(config):
        shutil.rmtree(target, ignore_errors=True)
        write_training_form(
            source.model,
            weights,
            source.folder,
            target,
            pattern=config.pattern,
            ignore=[layer.name for layer in plan.layers if layer.dense_because],
        )


def _export(
    config: RunConfig,
    source: Source,
    pruned: dict[str, torch.Tensor],
    provenance: dict[str, Any],
) -> None:
    """Write config.output, and the plots of the run."""
    training_form = config.run_dir / _TRAINING_FORM
    with _output_errors(config):
        publish(
            source.model,
            pruned,
            training_form,
            config,
            dtype=source.output_dtype(config.dtype),
            provenance=provenance,
        )
        # Only the last checkpoint is left of the intermediate forms.
        shutil.rmtree(training_form)
        write_plots(read_history(config.run_dir), config.run_dir / "plots")


@contextmanager
def _output_errors(config: RunConfig) -> Iterator[None]:
    """Raise RunError where the disk is full or a folder cannot be written."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"output: cannot write {config.output} ({reason}); the training is done and saved: "
            "make room and write it with --resume"
        ) from error


def _provenance(
    config: RunConfig, corpus: Corpus, plan: Plan, fixed: Fixed, evaluation: dict[str, Any]
) -> dict[str, Any]:
    """cast.json: what made this checkpoint. Folder and file names only, no paths of a machine."""
    return {
        "method": config.method,
        **({"initial_mask": config.initial_mask} if config.method == "fixed-mask" else {}),
        "teacher": config.model.resolve().name,
        "sparsity": config.pattern,
        "data": {
            "files": [source.name for source in config.data],
            **({"shares": corpus.shares} if corpus.shares else {}),
            **({"hub_commits": fixed.hub_commits} if fixed.hub_commits else {}),
            "sha256": fixed.data_sha256,
        },
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
        "compute": config.compute,
        "teacher_top_k": config.teacher_top_k if config.teacher == "cached" else None,
        "document_attention": config.document_attention,
        "seed": config.seed,
        "evaluation": evaluation,
        "versions": {name: version(name) for name in ("cast-serve", "torch", "transformers")},
    }
