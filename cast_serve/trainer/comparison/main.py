"""cast-train compare: every method on the same model, data and token budget; a table and plots.

    OUTPUT/NAME         the checkpoint of one run; NAME is its method, rate, lambda and seed
    OUTPUT/NAME.run     its checkpoints, logs and plots
    OUTPUT/results.*    .json, .md; perplexity.png, final.png

With --vary each method also runs with other values of a flag, one flag at a time: a sweep, which
OUTPUT/varied.png shows (vary.py).

With --text and --zero-shot every checkpoint, and the dense model as it came, is also asked what
cast-train evaluate asks (answers.py).

The same command again runs what is missing: finished runs are kept, an interrupted one continues.
With --jobs several run at once, each on a GPU of its own where there are as many (runs.py).
"""

import argparse
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from cast_serve.trainer.arguments import Parser, given_values, parse
from cast_serve.trainer.comparison.answers import UNTOUCHED, Questions
from cast_serve.trainer.comparison.jobs import (
    METHODS,
    ONE_SHOT,
    PRUNED_FIRST,
    TRAINED,
    Comparison,
    Job,
)
from cast_serve.trainer.comparison.vary import Variation, parse_variations, rule_of
from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.config_checks import METHODS_OF, given_in_vain, key_of, unread_defaults
from cast_serve.trainer.errors import RunError

_WITH_DECAY = ("cast", "sr-ste", "ast")


def main(arguments: Sequence[str]) -> int:
    """Run the comparison; returns the exit status.

    Raises:
        RunError: a flag is wrong; or runs failed, and the others are in the results.
    """
    comparison = parse_comparison(arguments)
    jobs = comparison.jobs
    # Here, because transformers takes seconds to import and --help must not wait for it.
    from transformers.utils.logging import disable_progress_bar

    from cast_serve.trainer.comparison.results import write_results
    from cast_serve.trainer.comparison.runs import ask, carry_out

    disable_progress_bar()
    console = Console(highlight=False)
    _check(jobs)
    folder, kept = jobs[0].config.output.parent, {job.name for job in jobs if job.finished}
    done, failed = [], []
    with closing(carry_out(comparison, arguments, console)) as endings:
        for number, (job, error) in enumerate(endings, start=1):
            end = "done" if error is None else "failed"
            console.print(f"compare {number}/{len(jobs)}: {job.name}: {end}", markup=False)
            if error is None:
                done.append(job)
            else:
                failed.append((job.name, error))
                console.print(error, style="red", markup=False)
            if done and not comparison.in_part and (job.name not in kept or number == len(jobs)):
                ask(done[0], done[0].config.model, UNTOUCHED)
                write_results(sorted(done, key=jobs.index), folder)
    if failed:
        name, error = failed[0]
        if len(jobs) == 1:
            raise RunError(error)
        raise RunError(f"{len(failed)} of {len(jobs)} runs failed; the first: {name}: {error}")
    if not comparison.in_part:
        console.print(f"wrote {folder / 'results.md'}", markup=False)
    return 0


def parse_comparison(arguments: Sequence[str]) -> Comparison:
    """What a command line asks for.

    Raises:
        RunError: an unknown method, run or flag, or a value that no run can have.
        SystemExit: --help.
    """
    given, rest = _parser().parse_known_args(arguments)
    methods = given.methods.split(",")
    for method in methods:
        if method not in METHODS:
            raise RunError(f"methods: {method!r} is none; known: {', '.join(METHODS)}")
    if len(set(methods)) < len(methods):
        raise RunError("methods: one is named twice")
    rest += ["--output", str(given.output / "run")]
    if given.jobs < 1:
        raise RunError(f"jobs: {given.jobs} is out of range; it must be at least 1")
    _refuse_what_differs(given_values(rest))
    base = parse(rest)
    _refuse_what_nobody_reads(base, methods)
    trained = [method for method in methods if method not in ONE_SHOT]
    bases: dict[Variation | None, RunConfig] = {None: base}
    for varied in parse_variations(given.vary, trained):
        bases[varied] = parse([*rest, *varied.flags])
    rates = _by_method("lr", given.lr, trained)
    decays = _by_method("lambda", given.decay, [m for m in methods if rule_of(m) in _WITH_DECAY])
    for method in trained:
        if method.startswith("cast:") and rates[method] == [None]:
            raise RunError(
                f"lr: {method} needs one, as --lr {method}=X: the default is the rate that brings "
                "masked weights to zero, and there they are already"
            )
    seeds = _seeds(given.seeds) if given.seeds else [base.seed]
    questions = Questions(text=tuple(given.text), zero_shot=tuple(given.zero_shot))
    jobs = []
    for method in methods:
        if method in ONE_SHOT:
            jobs += [_job(method, base, given.output, questions, seed=seeds[0])]
            continue
        for variation, lr, decay, seed in product(
            bases, rates[method], decays.get(method, [None]), seeds
        ):
            job = _job(
                method,
                bases[variation],
                given.output,
                questions,
                seed=seed,
                lr=lr,
                decay=decay,
                variation=variation,
            )
            jobs.append(job)
    return Comparison(
        jobs=_named(jobs, given.only.split(",")) if given.only else jobs,
        in_part=bool(given.only),
        at_once=given.jobs,
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="cast-train compare",
        description="Train and prune one model by every method with the same data and budget.",
        epilog="Any other flag is cast-train's and holds for every run, such as --model, --data, "
        "--eval-data, --tokens, --batch-size, --config. The same command again continues.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--methods",
        default=",".join((*ONE_SHOT, *TRAINED)),
        metavar="A,B",
        help=f"of {', '.join(METHODS)} (default: all but the last {len(PRUNED_FIRST)})",
    )
    parser.add_argument("--seeds", metavar="N,N", help="each method once with each (default: 0)")
    parser.add_argument(
        "--lr",
        default="",
        metavar="METHOD=X,...",
        help="peak learning rates; a method named several times runs with each (default: each "
        "method's own, see cast-train --help)",
    )
    parser.add_argument(
        "--vary",
        nargs="+",
        default=[],
        metavar="KEY=X,X",
        help="other values of a flag, such as eta=0.3,0.9: each a further run of every method that "
        "is trained, all other flags as given",
    )
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="further columns: perplexity of each file as one text, as cast-train evaluate has it",
    )
    parser.add_argument(
        "--zero-shot",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="likewise, the accuracy in each .jsonl of choices",
    )
    parser.add_argument(
        "--lambda", dest="decay", default="", metavar="METHOD=X,...", help="likewise, the decay"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs at once, each a process of its own, dealt to the GPUs in turn (default 1)",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="RUN,...",
        help="of all these runs, those that are named as their folders; the command without it "
        "makes the table",
    )
    return parser


def _named(jobs: list[Job], names: list[str]) -> list[Job]:
    known = [job.name for job in jobs]
    for name in names:
        if name not in known:
            raise RunError(f"only: {name!r} is no run of these; known: {', '.join(known)}")
    return [job for job in jobs if job.name in names]


def _refuse_what_differs(given: dict[str, Any]) -> None:
    """What is one for all runs here and must not be, or has no meaning."""
    for key, one_for_all, instead in (
        ("method", "cast", "name them in --methods"),
        ("start", "dense", "name the method cast:sparsegpt"),
        ("lr", None, "give --lr METHOD=X"),
        ("lambda_", None, "give --lambda METHOD=X"),
        ("resume", False, "leave it out: a comparison continues by itself"),
        ("dry_run", False, "leave it out; cast-train --dry-run checks one method"),
    ):
        if given.get(key, one_for_all) != one_for_all:
            raise RunError(f"{key_of(key)}: it differs from run to run; {instead}")
    if given.get("export") == "training":
        raise RunError("export: it differs from run to run; the methods share packed and dense")


def _refuse_what_nobody_reads(base: RunConfig, methods: list[str]) -> None:
    """A flag that all methods of `methods` would be given at its default."""
    vain = [given_in_vain(rule_of(method), base) for method in methods]
    # One-shot methods look at nothing of these but at the pattern.
    read = {"pattern"} if set(ONE_SHOT) & set(methods) else set()
    for key in vain[0]:
        if key not in read and all(key in keys for keys in vain):
            of = ", ".join(METHODS_OF[key])
            raise RunError(f"{key}: is of {of} alone, and --methods names none of these")


def _by_method(key: str, text: str, methods: list[str]) -> dict[str, list[float | None]]:
    """`a=1,b=2,b=3` as {a: [1], b: [2, 3]}; [None], the default, for the others."""
    found: dict[str, list[float | None]] = {}
    for part in filter(None, text.split(",")):
        method, equals, value = part.rpartition("=")
        if not equals:
            raise RunError(f"{key}: {part!r} names no method; write --{key} METHOD={part}")
        if method not in methods:
            known = ", ".join(methods) or "none of these methods has one"
            raise RunError(f"{key}: {method!r} is not trained with one here; known: {known}")
        try:
            number = float(value)
        except ValueError:
            raise RunError(f"{key}: expected a number for {method}, got {value!r}") from None
        # As the folders are named.
        if f"{number:g}" in (f"{other:g}" for other in found.get(method, []) if other is not None):
            raise RunError(f"{key}: {method}={value} is given twice")
        found.setdefault(method, []).append(number)
    return {method: found.get(method, [None]) for method in methods}


def _seeds(text: str) -> list[int]:
    seeds = [int(part) for part in text.split(",") if part.isdecimal()]
    if len(set(seeds)) < len(text.split(",")):
        raise RunError(f"seeds: expected different whole numbers such as 0,1,2, got {text!r}")
    return seeds


def _job(
    method: str,
    base: RunConfig,
    folder: Path,
    questions: Questions,
    *,
    seed: int,
    lr: float | None = None,
    decay: float | None = None,
    variation: Variation | None = None,
) -> Job:
    # Any: mypy does not see that the parts of METHODS are those that RunConfig knows.
    trained: Any
    mask: Any
    trained, _, mask = method.partition(":")
    if method in ONE_SHOT:
        # A mask that is fixed, and no step of training.
        trained, mask = "fixed-mask", method
    key = "start" if trained == "cast" else "initial_mask"
    start = {key: mask} if mask else {}
    parts = [f"oneshot-{method}" if method in ONE_SHOT else method.replace(":", "-")]
    parts += [f"lr{lr:g}"] if lr is not None else []
    parts += [f"lambda{decay:g}"] if decay is not None else []
    parts += [variation.name] if variation is not None else []
    config = replace(
        base,
        # RunConfig refuses keys that the method does not look at.
        **(unread_defaults(trained, base) | start),
        method=trained,
        lr=lr,
        lambda_=decay,
        seed=seed,
        # About ten points of the curve.
        eval_steps=base.eval_steps or 0.1,
        output=folder / "-".join([*parts, f"seed{seed}"]),
    )
    return Job(method=method, config=config, questions=questions, variation=variation)


def _check(jobs: list[Job]) -> None:
    """Refuse before hours of work what would be refused after them."""
    from cast_serve.trainer.run_dir import check_folders, read_run
    from cast_serve.trainer.train import run

    jobs[0].questions.check()
    for job in jobs:
        if (job.config.run_dir / "run.json").is_file():
            read_run(job.config)
            continue
        if job.finished:
            # Nothing else says what it was trained with: it may be another eta or budget.
            raise RunError(
                f"output: {job.config.output} is finished, and {job.config.run_dir}/run.json, "
                "which says with what settings, is gone; put it back, or remove the output and "
                "run again"
            )
        check_folders(job.config)
        if job.config.method == "cast" and len(jobs) > 1:
            # Its travel may be too short; a run by itself says so at once.
            run(replace(job.config, dry_run=True), Console(quiet=True))
