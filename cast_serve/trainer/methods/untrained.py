"""A one-shot method as a run of no steps: prune, evaluate, write what a trained run writes."""

import shutil

from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.data import hub_commits
from cast_serve.trainer.evaluation.mean_loss import mean_loss
from cast_serve.trainer.export import (
    TRAINING_FORM,
    publish,
    write_training_form,
)
from cast_serve.trainer.layers import layers_of
from cast_serve.trainer.methods import method_of
from cast_serve.trainer.methods.start import CALIBRATION_SEQUENCES
from cast_serve.trainer.output import output_errors
from cast_serve.trainer.processes import takes_gpu
from cast_serve.trainer.provenance import of_one_shot
from cast_serve.trainer.run_dir import Fixed, write_run
from cast_serve.trainer.source import context_length, load_source
from cast_serve.trainer.train import load_text, make_stream


def prune_without_training(config: RunConfig) -> None:
    """Write config.output: the model pruned by config.pruned_first, and no more.

    Args:
        config: of method fixed-mask; its budget is not used.

    Raises:
        RunError: as train.run; the output cannot be written.
    """
    source = load_source(config.model)
    model = source.model
    model.to("cuda" if takes_gpu(config.device) else "cpu")  # type: ignore[arg-type]  # hidden by a decorator
    context = context_length(model, config.context)
    commits = hub_commits((*config.data, *config.eval_data), known={}, cache=config.token_cache)
    corpus = load_text(config, source, context=context, commits=commits)
    layers = layers_of(model, config)
    dense = mean_loss(model, corpus.evaluation, batch_size=config.batch_size)
    fixed = Fixed(
        steps=0,
        context=context,
        sequences_per_step=0,
        lr=0.0,
        lambda_=0.0,
        data_sha256=corpus.sha256,
        dense_loss=dense,
        hub_commits=commits,
        evaluation_sha256=corpus.evaluation_sha256,
    )
    write_run(config, fixed)
    sample = make_stream(config, corpus, length=CALIBRATION_SEQUENCES)
    method_of(config).add_layers(model, layers, sample, resumed=False)
    loss = mean_loss(model, corpus.evaluation, batch_size=config.batch_size)
    provenance = of_one_shot(config, corpus, fixed, after=loss)
    training_form = config.run_dir / TRAINING_FORM
    with output_errors(config.output, trained=False):
        shutil.rmtree(training_form, ignore_errors=True)
        write_training_form(
            model,
            model.state_dict(),
            source.folder,
            training_form,
            pattern=config.pattern,
            ignore=[layer.name for layer in layers if layer.dense_because],
        )
        publish(
            model,
            model.state_dict(),
            training_form,
            config,
            dtype=source.output_dtype(config.dtype),
            provenance=provenance,
        )
        shutil.rmtree(training_form)
