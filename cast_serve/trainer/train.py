"""One CAST run from a dense checkpoint to the sparse one: plan, train, prune, fold, export."""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.trainer import checkpoint
from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.data import BlockStream, Corpus, load_corpus
from cast_serve.trainer.data.packing import require_document_attention
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.evaluate import mean_loss, to_perplexity
from cast_serve.trainer.export import dtype_name, prune_and_fold_, publish, write_training_form
from cast_serve.trainer.gradient import Gradient
from cast_serve.trainer.journal import Journal, read_history
from cast_serve.trainer.layers import (
    LayerChoice,
    compile_blocks,
    layers_of,
    recompute_activations,
)
from cast_serve.trainer.loop import Training
from cast_serve.trainer.methods import method_of
from cast_serve.trainer.objective import prepare_head
from cast_serve.trainer.parallel import is_sharded, replicate, shard, whole_weights
from cast_serve.trainer.plan import Plan, check_travel, make_plan, planned_sources, token_budget
from cast_serve.trainer.plots import write_plots
from cast_serve.trainer.processes import Processes, join
from cast_serve.trainer.report import render_plan
from cast_serve.trainer.run_dir import (
    Fixed,
    check_folders,
    last_checkpoint,
    read_run,
    write_run,
)
from cast_serve.trainer.source import Source, context_length, load_empty_source, load_source
from cast_serve.trainer.teacher import make_teacher
from cast_serve.trainer.teacher_cache import CachedStream, Origin, TeacherCache, sequences_of

_TRAINING_FORM = "training-form"


def run(config: RunConfig, console: Console) -> None:
    """Carry out `config`: a dry run prints the plan; else config.output is written at the end.

    Called in every process of a run that torchrun started; the first one prints and writes.

    Raises:
        RunError: anything a user can put right, said in one line.
    """
    with join(config.device) as processes:
        # highlight=False as in main.py.
        shown = console if processes.is_first else Console(quiet=True, highlight=False)
        _run(config, shown, processes)


def _run(config: RunConfig, console: Console, processes: Processes) -> None:
    processes.on_first(lambda: check_folders(config))
    if config.offload and processes.count == 1:
        raise RunError("offload: needs several processes; start them with torchrun")
    if config.cuda_graph and (processes.count > 1 or processes.device.type != "cuda"):
        there = f"{processes.count} processes on {processes.device.type}"
        raise RunError(f"cuda_graph: needs one process on an NVIDIA GPU; here are {there}")
    resumes = config.resume and not config.dry_run
    fixed = processes.on_first(lambda: read_run(config)) if resumes else None
    source = _load_source(config, processes)
    context = context_length(source.model, config.context)
    if config.document_attention:
        processes.on_first(lambda: require_document_attention(source.model))
    corpus = processes.first_to_last(
        lambda: load_text(config, source, context=context, processes=processes.count)
    )
    if fixed is not None:
        check_same_data(fixed, corpus)
    layers = layers_of(source.model, config)
    remark = prepare_head(source.model, config)
    if remark:
        console.print(remark, markup=False)
    # Of the weights, which the first process has.
    plan = processes.on_first(
        lambda: _plan(config, source, corpus, layers, context, fixed, processes)
    )
    if fixed is not None:
        check_same_step(fixed, plan)
    console.print(render_plan(plan, config))
    # A run that is resumed was allowed when it started.
    warning = check_travel(plan, allowed=config.allow_short_travel or fixed is not None)
    if warning:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    if not config.dry_run:
        _train(config, source, corpus, plan, fixed, console, processes)


def _load_source(config: RunConfig, processes: Processes) -> Source:
    if not is_sharded(config, processes):
        return load_source(config.model)
    loaded: list[Source] = []

    def load() -> torch.dtype:
        loaded.append(load_source(config.model))
        return loaded[0].dtype

    dtype = processes.on_first(load)
    return loaded[0] if loaded else load_empty_source(config.model, dtype)


def _plan(
    config: RunConfig,
    source: Source,
    corpus: Corpus,
    layers: list[LayerChoice],
    context: int,
    fixed: Fixed | None,
    processes: Processes,
) -> Plan:
    return make_plan(
        config,
        source.model,
        layers,
        context=context,
        train_blocks=corpus.train_blocks,
        eval_blocks=len(corpus.evaluation),
        evaluated_on=corpus.evaluated_on,
        lambda_=fixed.lambda_ if fixed else config.lambda_,
        processes=processes.count,
        sources=planned_sources(corpus),
    )


def _train(
    config: RunConfig,
    source: Source,
    corpus: Corpus,
    plan: Plan,
    fixed: Fixed | None,
    console: Console,
    processes: Processes,
) -> None:
    sharded = is_sharded(config, processes)
    blocks = make_stream(config, corpus, length=plan.steps * plan.sequences_per_step)
    cached = config.eta > 0 and config.teacher == "cached"
    stream: Dataset[dict[str, torch.Tensor]] = blocks
    teacher = None
    if cached:
        cache = _fill_teacher_cache(config, source, corpus, plan, blocks, console, processes)
        stream = CachedStream(blocks, cache)
    elif config.eta > 0:
        teacher = make_teacher(source.model, config, processes)
    dense_loss = math.nan
    if fixed is None and not sharded:
        source.model.to(processes.device)  # type: ignore[arg-type]  # hidden by a decorator
        dense_loss = mean_loss(source.model, corpus.evaluation, processes=processes)
    method = method_of(config)
    found = processes.on_first(lambda: last_checkpoint(config.run_dir)) if config.resume else None
    method.add_layers(source.model, list(plan.layers), blocks, resumed=found is not None)
    if config.gradient_checkpointing:
        recompute_activations(source.model)
    if config.compile:
        compile_blocks(source.model)
    model = _spread(config, source.model, processes)
    gradient = Gradient(config, model, teacher, stream, processes)
    if fixed is None:
        if sharded:
            # One process has no room for the whole; with scales of one it is the dense model.
            dense_loss = mean_loss(model, corpus.evaluation, processes=processes)
        fixed = Fixed(
            steps=plan.steps,
            context=plan.context,
            sequences_per_step=plan.sequences_per_step,
            lr=plan.lr,
            lambda_=config.lambda_ or method.decay(gradient),
            data_sha256=corpus.sha256,
            dense_loss=dense_loss,
        )
        begun = fixed
        processes.on_first(lambda: write_run(config, begun))
    guess = math.log(source.model.config.get_text_config().vocab_size)
    optimizer = method.optimizer(model, fixed)
    training = Training(config, fixed, gradient, optimizer, corpus.evaluation, guess=guess)
    done = checkpoint.load(found, model, optimizer, processes) if found else 0
    if config.resume:
        console.print(f"resuming after step {done} of {fixed.steps}", markup=False)
    if processes.is_first:
        with Journal(config.run_dir, console, done=done, steps=fixed.steps) as journal:
            training.run(done, journal)
    else:
        training.run(done, None)
    del training, optimizer, gradient, teacher
    _finish(config, source, model, corpus, plan, fixed, console, processes)


def _finish(
    config: RunConfig,
    source: Source,
    model: nn.Module,
    corpus: Corpus,
    plan: Plan,
    fixed: Fixed,
    console: Console,
    processes: Processes,
) -> None:
    """Evaluate, prune, fold, evaluate again, export and plot."""
    before = mean_loss(model, corpus.evaluation, processes=processes)
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


def load_text(config: RunConfig, source: Source, *, context: int, processes: int = 1) -> Corpus:
    """The text of a run, in blocks of `context` tokens."""
    return load_corpus(
        config.data,
        source.tokenizer,
        context=context,
        held_out=config.held_out,
        eval_sources=config.eval_data,
        budget=token_budget(config, context=context, processes=processes),
        text_key=config.text_key,
        cache=config.token_cache,
    )


def make_stream(config: RunConfig, corpus: Corpus, *, length: int) -> BlockStream:
    """The first `length` sequences of training, in the order of the seed."""
    return BlockStream(
        *corpus.parts,
        length=length,
        seed=config.seed,
        shares=corpus.shares,
        eos=corpus.eos if config.document_attention else None,
    )


def check_same_data(fixed: Fixed, corpus: Corpus) -> None:
    """Raise RunError if the files no longer hold the text that the run was started on."""
    if fixed.data_sha256 != corpus.sha256:
        raise RunError(
            "resume: the data files no longer give the tokens the run was started on; "
            "restore them, or start a new run with another --output"
        )


def check_same_step(fixed: Fixed, plan: Plan) -> None:
    """Raise RunError if a step would have more or fewer sequences than the run was started with."""
    if fixed.sequences_per_step != plan.sequences_per_step:
        raise RunError(
            f"resume: the run was started with {fixed.sequences_per_step} sequences a step, and "
            f"processes x batch_size x gradient_accumulation is now {plan.sequences_per_step}; "
            "change batch_size or gradient_accumulation so that it is the same"
        )


def _fill_teacher_cache(
    config: RunConfig,
    source: Source,
    corpus: Corpus,
    plan: Plan,
    blocks: BlockStream,
    console: Console,
    processes: Processes,
) -> TeacherCache:
    """The cache of the untouched dense model's top tokens, computed by the first process."""
    origin = Origin.of(config, source.model, data_sha256=corpus.sha256, context=plan.context)
    folder = config.run_dir / "teacher"

    def fill() -> None:
        cache = TeacherCache(folder, origin)
        sequences = partial(sequences_of, blocks, len(blocks))
        if next(cache.missing(sequences()), None) is None:
            return
        console.print(f"computing the teacher's top {config.teacher_top_k}", markup=False)
        teacher = make_teacher(source.model, config, processes)
        cache.fill(sequences(), teacher, batch_size=config.batch_size)

    processes.on_first(fill)
    return TeacherCache(folder, origin)


def _spread(config: RunConfig, model: PreTrainedModel, processes: Processes) -> nn.Module:
    if not is_sharded(config, processes):
        return replicate(model, processes)
    shard(model, processes, offload=config.offload)
    return model


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
        "masked_rate": config.masked_rate,
        "compute": config.compute,
        "teacher_top_k": config.teacher_top_k if config.teacher == "cached" else None,
        "document_attention": config.document_attention,
        "seed": config.seed,
        "evaluation": evaluation,
        "versions": {name: version(name) for name in ("cast-serve", "torch", "transformers")},
    }
