"""One CAST run from a dense checkpoint to the sparse one: plan, train, finish (finish.py)."""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from cast_serve.trainer import checkpoint
from cast_serve.trainer.calibrate import require_lambda
from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.data import BlockStream, Corpus, hub_commits, load_corpus, require_keys
from cast_serve.trainer.data.packing import require_document_attention
from cast_serve.trainer.distillation.teacher import make_teacher
from cast_serve.trainer.distillation.teacher_cache import (
    CachedStream,
    Origin,
    TeacherCache,
    sequences_of,
)
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.evaluation.mean_loss import mean_loss
from cast_serve.trainer.finish import finish
from cast_serve.trainer.gradient import Gradient
from cast_serve.trainer.importance import kept_or_measured, set_importance
from cast_serve.trainer.journal import Journal
from cast_serve.trainer.layers import (
    LayerChoice,
    compile_blocks,
    layers_of,
    recompute_activations,
)
from cast_serve.trainer.loop import Training
from cast_serve.trainer.methods import method_of
from cast_serve.trainer.methods.layers import masked_layers
from cast_serve.trainer.objective import prepare_head
from cast_serve.trainer.parallel import is_sharded, replicate, shard
from cast_serve.trainer.plan import Plan, check_travel, make_plan, planned_sources, token_budget
from cast_serve.trainer.processes import Processes, join
from cast_serve.trainer.report import render_plan
from cast_serve.trainer.run_dir import (
    Fixed,
    held,
    last_checkpoint,
    read_run,
    write_run,
)
from cast_serve.trainer.source import (
    Source,
    context_length,
    dense_sha256,
    load_empty_source,
    load_source,
)


def run(config: RunConfig, console: Console) -> None:
    """Carry out `config`: a dry run prints the plan; else config.output is written at the end.

    Called in every process of a run that torchrun started; the first one prints and writes.

    Raises:
        RunError: anything a user can put right, said in one line.
    """
    with join(config.device) as processes, ExitStack() as folders:
        # highlight=False as in main.py.
        shown = console if processes.is_first else Console(quiet=True, highlight=False)
        processes.on_first(lambda: folders.enter_context(held(config)))
        _run(config, shown, processes)


def _run(config: RunConfig, console: Console, processes: Processes) -> None:
    require_lambda(config)
    if config.loss == "liger" and find_spec("liger_kernel") is None:
        raise RunError("loss: liger needs Liger-Kernel; install it: pip install liger-kernel")
    if config.offload and processes.count == 1:
        raise RunError("offload: needs several processes; start them with torchrun")
    if config.cuda_graph and (processes.count > 1 or processes.device.type != "cuda"):
        there = f"{processes.count} processes on {processes.device.type}"
        raise RunError(f"cuda_graph: needs one process on an NVIDIA GPU; here are {there}")
    resumes = config.resume and not config.dry_run
    if not resumes:
        processes.on_first(lambda: require_keys((*config.data, *config.eval_data), config.text_key))
    fixed = processes.on_first(lambda: read_run(config)) if resumes else None
    if fixed is not None:
        check_same_step(config, fixed, processes)
    # Of one process, or another might see a newer one.
    commits = processes.on_first(lambda: _hub_commits(config, fixed, console))
    source = _load_source(config, processes)
    # Of the first process, which has the weights in any case.
    dense = "" if config.dry_run else processes.on_first(lambda: dense_sha256(source))
    if fixed is not None:
        check_same_model(config, fixed, dense)
    context = context_length(source.model, config.context)
    if config.document_attention:
        processes.on_first(lambda: require_document_attention(source.model))
    corpus = processes.first_to_last(
        lambda: load_text(
            config, source, context=context, processes=processes.count, commits=commits
        )
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
    console.print(render_plan(plan, config))
    if config.parallel == "fsdp" and processes.count == 1:
        told = "warning: parallel=fsdp in one process shards nothing; start it with torchrun"
        console.print(told, style="yellow", markup=False)
    # A run that is resumed was allowed when it started.
    warning = check_travel(plan, allowed=config.allow_short_travel or fixed is not None)
    if warning:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    if not config.dry_run:
        _train(config, source, dense, corpus, plan, fixed, commits, console, processes)


def _hub_commits(config: RunConfig, fixed: Fixed | None, console: Console) -> dict[str, str]:
    """Commits of the run's data sets of the hub, by name: of a resumed run those it recorded."""
    known = fixed.hub_commits if fixed else {}
    sources = (*config.data, *config.eval_data)
    commits = hub_commits(sources, known=known, cache=config.token_cache)
    for name, commit in commits.items():
        since = ", as when the run started" if name in known else ""
        console.print(f"hub:{name} is read at commit {commit}{since}", markup=False)
    return commits


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
    dense: str,
    corpus: Corpus,
    plan: Plan,
    fixed: Fixed | None,
    commits: dict[str, str],
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
    if not sharded:
        source.model.to(processes.device)  # type: ignore[arg-type]  # hidden by a decorator
    if fixed is None and not sharded:
        dense_loss = mean_loss(
            source.model, corpus.evaluation, batch_size=config.batch_size, processes=processes
        )
    norms: dict[str, torch.Tensor] = {}
    if config.mask_metric == "activation":
        layers = list(plan.layers)
        norms = processes.on_first(
            lambda: kept_or_measured(
                config.run_dir, source.model, layers, blocks, resumed=fixed is not None
            )
        )
    method = method_of(config)
    found = processes.on_first(lambda: last_checkpoint(config.run_dir)) if config.resume else None
    method.add_layers(source.model, list(plan.layers), blocks, resumed=found is not None)
    if norms:
        set_importance(source.model, norms)
    if config.gradient_checkpointing:
        recompute_activations(source.model)
    if config.compile:
        compile_blocks(source.model)
    model = _spread(config, source.model, processes)
    gradient = Gradient(config, model, teacher, stream, processes)
    if fixed is None:
        if sharded:
            # One process has no room for the whole; with scales of one it is the dense model.
            dense_loss = mean_loss(
                model, corpus.evaluation, batch_size=config.batch_size, processes=processes
            )
        fixed = Fixed(
            steps=plan.steps,
            context=plan.context,
            sequences_per_step=plan.sequences_per_step,
            lr=plan.lr,
            lambda_=config.lambda_ or method.decay(gradient),
            data_sha256=corpus.sha256,
            dense_loss=dense_loss,
            hub_commits=commits,
            evaluation_sha256=corpus.evaluation_sha256,
            dense_sha256=dense,
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
    finish(config, source, model, corpus, plan, fixed, console, processes)


def load_text(
    config: RunConfig,
    source: Source,
    *,
    context: int,
    processes: int = 1,
    commits: dict[str, str],
) -> Corpus:
    """The text of a run, in blocks of `context` tokens.

    Args:
        commits: of the data sets of the hub, by name.
    """
    return load_corpus(
        config.data,
        source.tokenizer,
        context=context,
        held_out=config.held_out,
        eval_sources=config.eval_data,
        budget=token_budget(config, context=context, processes=processes),
        text_key=config.text_key,
        cache=config.token_cache,
        commits=commits,
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


def check_same_model(config: RunConfig, fixed: Fixed, dense: str) -> None:
    """Raise RunError if the folder of the dense model holds another one than at the start.

    Args:
        dense: dense_sha256 of what is there now.
    """
    if fixed.dense_sha256 not in ("", dense):
        raise RunError(
            f"resume: weights or config.json of {config.model} are not those the run was started "
            "from; restore them, or start a new run with another --output"
        )


def check_same_data(fixed: Fixed, corpus: Corpus) -> None:
    """Raise RunError if the files no longer hold the text that the run was started on."""
    if fixed.data_sha256 != corpus.sha256:
        raise RunError(
            "resume: the data files no longer give the tokens the run was started on; "
            "restore them, or start a new run with another --output"
        )
    if fixed.evaluation_sha256 not in ("", corpus.evaluation_sha256):
        raise RunError(
            "resume: eval_data no longer gives the tokens that the dense model was evaluated on; "
            "restore it, or start a new run with another --output"
        )


def check_same_step(config: RunConfig, fixed: Fixed, processes: Processes) -> None:
    """Raise RunError if a step would have more or fewer sequences than the run was started with."""
    sequences = config.batch_size * config.gradient_accumulation * processes.count
    if fixed.sequences_per_step != sequences:
        raise RunError(
            f"resume: the run was started with {fixed.sequences_per_step} sequences a step, and "
            f"processes x batch_size x gradient_accumulation is now {sequences}; "
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
    """The cache of the untouched dense model's top tokens, computed by the first process.

    Shard by shard, because the others wait for each: all of them may take longer than they wait.
    """
    origin = Origin.of(config, source.model, data_sha256=corpus.sha256, context=plan.context)
    folder = config.run_dir / "teacher"

    def fill() -> Iterator[int]:
        cache = TeacherCache(folder, origin)
        sequences = partial(sequences_of, blocks, len(blocks))
        if next(cache.missing(sequences()), None) is None:
            return
        yield len(cache)
        teacher = make_teacher(source.model, config, processes)
        yield from cache.fill(sequences(), teacher, batch_size=config.batch_size)

    shards, most = fill(), min(len(blocks), plan.train_blocks)
    while (done := processes.on_first(lambda: next(shards, None))) is not None:
        console.print(
            f"teacher's top {config.teacher_top_k}: {done} of at most {most} sequences",
            markup=False,
        )
    return TeacherCache(folder, origin)


def _spread(config: RunConfig, model: PreTrainedModel, processes: Processes) -> nn.Module:
    if not is_sharded(config, processes):
        spread = replicate(model, processes)
        # Weights are the first process's now, and so must masks be.
        for _, layer in masked_layers(spread):
            layer.refresh_mask_()
        return spread
    shard(model, processes, offload=config.offload)
    return model
