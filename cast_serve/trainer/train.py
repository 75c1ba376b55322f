"""One CAST run from a dense checkpoint to the sparse one: plan, train, prune, fold, export."""

import shutil
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console

from cast_serve.trainer.calibrate import measure_lambda
from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.data import BlockStream, Corpus, load_corpus
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.evaluate import mean_loss, to_perplexity
from cast_serve.trainer.export import dtype_name, prune_and_fold_, publish, write_training_form
from cast_serve.trainer.layers import LayerChoice, add_scales, choose_layers
from cast_serve.trainer.loop import CastTrainer, tensorboard
from cast_serve.trainer.objective import prepare_head
from cast_serve.trainer.plan import Plan, check_travel, make_plan
from cast_serve.trainer.plots import write_plots
from cast_serve.trainer.report import render_plan
from cast_serve.trainer.run_dir import (
    Fixed,
    check_folders,
    last_checkpoint,
    read_run,
    write_run,
)
from cast_serve.trainer.source import Source, context_length, load_source
from cast_serve.trainer.teacher import make_teacher, teacher_bytes
from cast_serve.trainer.teacher_cache import CachedStream, Origin, TeacherCache, sequences_of


def run(config: RunConfig, console: Console) -> None:
    """Carry out `config`: a dry run prints the plan; else config.output is written at the end.

    Raises:
        RunError: anything a user can put right, said in one line.
    """
    check_folders(config)
    fixed = read_run(config) if config.resume and not config.dry_run else None
    source = load_source(config.model)
    context = context_length(source.model, config.context)
    corpus = load_corpus(
        config.data,
        source.tokenizer,
        context=context,
        held_out=config.held_out,
        eval_files=config.eval_data,
    )
    if fixed is not None:
        check_same_data(fixed, corpus)
    layers = choose_layers(source.model, config.nm, scaling_blocks=config.scaling_blocks)
    remark = prepare_head(source.model, config)
    if remark:
        console.print(remark, markup=False)
    plan = _plan(config, source, corpus, layers, context, fixed)
    console.print(render_plan(plan, config))
    # A run that is resumed was allowed when it started.
    warning = check_travel(plan, allowed=config.allow_short_travel or fixed is not None)
    if warning:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    if config.dry_run:
        return
    _train(config, source, corpus, plan, fixed, console)


def _plan(
    config: RunConfig,
    source: Source,
    corpus: Corpus,
    layers: list[LayerChoice],
    context: int,
    fixed: Fixed | None,
) -> Plan:
    return make_plan(
        config,
        source.model,
        layers,
        context=context,
        train_blocks=len(corpus.train),
        eval_blocks=len(corpus.evaluation),
        evaluated_on=corpus.evaluated_on,
        teacher_bytes=teacher_bytes(source.model, config),
        lambda_=fixed.lambda_ if fixed else config.lambda_,
    )


def _train(
    config: RunConfig,
    source: Source,
    corpus: Corpus,
    plan: Plan,
    fixed: Fixed | None,
    console: Console,
) -> None:
    device = torch.device(
        "cuda" if config.device == "auto" and torch.cuda.is_available() else "cpu"
    )
    model = source.model
    stream = BlockStream(
        corpus.train,
        length=plan.steps * config.batch_size * config.gradient_accumulation,
        seed=config.seed,
    )
    cache = _teacher_cache(source, corpus, plan, config)
    sequences = partial(sequences_of, stream, len(stream))
    filled = cache is not None and next(cache.missing(sequences()), None) is None
    teacher = make_teacher(model, config, device) if config.eta > 0 and not filled else None
    model.to(device)  # type: ignore[arg-type]  # hidden by a decorator of transformers
    dense_loss = fixed.dense_loss if fixed else mean_loss(model, corpus.evaluation)
    add_scales(model, list(plan.layers), scaling_blocks=config.scaling_blocks)
    if fixed is None:
        fixed = Fixed(
            steps=plan.steps,
            context=plan.context,
            lr=plan.lr,
            lambda_=config.lambda_ or measure_lambda(model, stream, config),
            data_sha256=corpus.sha256,
            dense_loss=dense_loss,
        )
        write_run(config, fixed)
    if cache is not None:
        if teacher is not None:
            console.print(f"computing the teacher's top {config.teacher_top_k}", markup=False)
            cache.fill(sequences(), teacher, batch_size=config.batch_size)
        teacher = None
    checkpoint = last_checkpoint(config.run_dir) if config.resume else None
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    if config.resume:
        console.print(f"resuming after step {done} of {fixed.steps}", markup=False)
    trainer = CastTrainer(
        config,
        fixed,
        model,
        teacher,
        stream if cache is None else CachedStream(stream, cache),
        callbacks=[tensorboard(config, first_step=done + 1)],
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    history = trainer.state.log_history
    del trainer, teacher
    _finish(config, source, corpus, plan, fixed, console, history)


def _finish(
    config: RunConfig,
    source: Source,
    corpus: Corpus,
    plan: Plan,
    fixed: Fixed,
    console: Console,
    history: list[dict[str, Any]],
) -> None:
    """Evaluate, prune, fold, evaluate again, export and plot."""
    model = source.model
    before = mean_loss(model, corpus.evaluation)
    training_form = config.run_dir / "training-form"
    shutil.rmtree(training_form, ignore_errors=True)
    write_training_form(
        model,
        source.folder,
        training_form,
        pattern=config.pattern,
        ignore=[layer.name for layer in plan.layers if layer.dense_because],
    )
    prune_and_fold_(model, config)
    after = mean_loss(model, corpus.evaluation)
    evaluation = {
        "on": corpus.evaluated_on,
        "tokens": corpus.evaluation.numel(),
        "context": plan.context,
        "perplexity_dense": to_perplexity(fixed.dense_loss),
        "perplexity_before_prune": to_perplexity(before),
        "perplexity_after_prune": to_perplexity(after),
    }
    dtype = source.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    publish(
        model,
        training_form,
        config,
        dtype=dtype,
        provenance=_provenance(config, plan, fixed, evaluation),
    )
    # Only the last checkpoint is left of the intermediate forms.
    shutil.rmtree(training_form)
    write_plots(history, config.run_dir / "plots")
    stored = "float32" if config.export_form == "training" else dtype_name(dtype)
    for key in ("perplexity_dense", "perplexity_before_prune", "perplexity_after_prune"):
        label = key.removeprefix("perplexity_").replace("_", " ")
        console.print(
            f"perplexity {label}: {evaluation[key]:.3f} ({corpus.evaluated_on})", markup=False
        )
    console.print(f"wrote {config.output} ({config.export_form}, {stored})", markup=False)
    console.print(f"logs and plots: {config.run_dir}", markup=False)


def check_same_data(fixed: Fixed, corpus: Corpus) -> None:
    """Raise RunError if the files no longer hold the text that the run was started on."""
    if fixed.data_sha256 != corpus.sha256:
        raise RunError(
            "resume: the data files no longer give the tokens the run was started on; "
            "restore them, or start a new run with another --output"
        )


def _teacher_cache(
    source: Source, corpus: Corpus, plan: Plan, config: RunConfig
) -> TeacherCache | None:
    """The cache of the untouched dense model's top tokens; None where the run asks for none."""
    if config.eta == 0 or config.teacher != "cached":
        return None
    origin = Origin.of(config, source.model, data_sha256=corpus.sha256, context=plan.context)
    return TeacherCache(config.run_dir / "teacher", origin)


def _provenance(
    config: RunConfig, plan: Plan, fixed: Fixed, evaluation: dict[str, Any]
) -> dict[str, Any]:
    """cast.json: what made this checkpoint. Folder and file names only, no paths of a machine."""
    return {
        "teacher": config.model.resolve().name,
        "sparsity": config.pattern,
        "data": {"files": [path.name for path in config.data], "sha256": fixed.data_sha256},
        "tokens": plan.tokens,
        "steps": fixed.steps,
        "batch": config.batch_size * config.gradient_accumulation,
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
        "compute": config.compute,
        "teacher_top_k": config.teacher_top_k if config.teacher == "cached" else None,
        "seed": config.seed,
        "evaluation": evaluation,
        "versions": {name: version(name) for name in ("cast-serve", "torch", "transformers")},
    }
