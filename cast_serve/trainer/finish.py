"""The end of a run: the trained model is evaluated, pruned, folded, evaluated again and written."""

import shutil
from typing import Any

import torch
from rich.console import Console
from torch import nn

from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.data import Corpus
from cast_serve.trainer.evaluation.mean_loss import mean_loss
from cast_serve.trainer.export import (
    TRAINING_FORM,
    dtype_name,
    prune_and_fold_,
    publish,
    write_training_form,
)
from cast_serve.trainer.journal import read_history
from cast_serve.trainer.layers import scaled_layers
from cast_serve.trainer.output import output_errors
from cast_serve.trainer.parallel import whole_weights
from cast_serve.trainer.plan import Plan
from cast_serve.trainer.plots import write_plots
from cast_serve.trainer.processes import Processes
from cast_serve.trainer.provenance import of_training
from cast_serve.trainer.run_dir import Fixed
from cast_serve.trainer.source import Source


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
    before = mean_loss(model, corpus.evaluation, batch_size=config.batch_size, processes=processes)
    if config.mask_metric != "magnitude":
        # Who prunes what is written sees |w| alone.
        for _, layer in scaled_layers(model):
            layer.prune_(config.nm)
    weights = whole_weights(source.model)
    processes.on_first(lambda: _write_training_form(config, source, plan, weights))
    prune_and_fold_(model, config)
    after = mean_loss(model, corpus.evaluation, batch_size=config.batch_size, processes=processes)
    weights = {} if config.converts else whole_weights(source.model)
    provenance = of_training(config, corpus, plan, fixed, before=before, after=after)
    processes.on_first(lambda: _export(config, source, weights, provenance))
    dtype = dtype_name(source.output_dtype(config.dtype))
    stored = "float32" if config.export_form == "training" else dtype
    evaluation = provenance["evaluation"]
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
    target = config.run_dir / TRAINING_FORM
    with output_errors(config.output, trained=True):
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
    training_form = config.run_dir / TRAINING_FORM
    with output_errors(config.output, trained=True):
        publish(
            source.model,
            pruned,
            training_form,
            config,
            dtype=source.output_dtype(config.dtype),
            provenance=provenance,
        )
        # Of the intermediate forms the last `save_limit` checkpoints are left, for --resume.
        shutil.rmtree(training_form)
        write_plots(read_history(config.run_dir), config.run_dir / "plots")
