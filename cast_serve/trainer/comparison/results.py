"""What a comparison found: rows from the finished runs, results.json and results.md.

Every number is read from what the runs wrote: cast.json of the checkpoint, the run's log, and the
answers to further questions.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cast_serve.trainer.comparison.answers import UNTOUCHED, read_answers
from cast_serve.trainer.comparison.jobs import Job
from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.config_checks import own_settings
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.journal import read_history
from cast_serve.trainer.processes import takes_gpu

# The model as it came, in tables and plots.
DENSE = "untouched, dense"
_HEAD = ("method", "tokens", "lr", "lambda", "seed", "before the prune", "perplexity")


@dataclass(frozen=True, kw_only=True)
class Point:
    """Perplexity after `tokens`: as the model trains, and as it would be pruned (None: dense)."""

    tokens: int
    perplexity: float
    pruned: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run. `perplexity` is that of the written model; lr and lambda_ None where not used.

    `answers` hold `text` and `zero_shot` as cast-train evaluate gives them, if they were asked for.
    `varied` is the flag with another value than the rest has, by its key; empty in the others.
    `usual` is the checkpoint of the run without it, and its own in the others.
    `settings` are those of its method alone that are not at their defaults (config_checks.py).
    """

    method: str
    checkpoint: str
    tokens: int
    lr: float | None
    lambda_: float | None
    seed: int
    perplexity_dense: float
    perplexity_before_prune: float | None
    perplexity: float
    curve: tuple[Point, ...]
    answers: dict[str, Any] | None = None
    varied: dict[str, Any] = field(default_factory=dict)
    usual: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def otherwise(self) -> str:
        """`varied` in words."""
        return ", ".join(
            f"{key} {value}" if isinstance(value, str) else f"{key} {value:.4g}"
            for key, value in self.varied.items()
        )


def read_results(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """results.json of a comparison, and its rows.

    Raises:
        OSError, ValueError: the folder holds no results.json.
    """
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = []
    for row in found["rows"]:
        curve = tuple(Point(**point) for point in row.pop("curve"))
        rows.append(Row(**row, curve=curve))
    return found, rows


def write_results(jobs: Sequence[Job], folder: Path) -> list[Row]:
    """Write results.json, results.md and the plots (plots.py) of finished `jobs`."""
    import torch

    from cast_serve.bench.environment import describe
    from cast_serve.trainer.comparison.plots import write_plots

    _require_same_text(jobs)
    rows = [read_row(job) for job in jobs]
    configs = [job.config for job in jobs]
    config = configs[0]
    evaluation = _record(config)["evaluation"]
    on_gpu = takes_gpu(config.device)
    setting = {
        "model": config.model.resolve().name,
        "pattern": next((c.pattern for c in configs if c.method != "dense"), config.pattern),
        "data": [source.name for source in config.data],
        "evaluated_on": evaluation["on"],
        "evaluation_tokens": evaluation["tokens"],
        "context": evaluation["context"],
        **_given(jobs),
    }
    untouched = read_answers(folder, UNTOUCHED) if jobs[0].questions else None
    env = describe(torch.device("cuda", 0) if on_gpu else None)
    found = {
        "env": env,
        "setting": setting,
        "untouched": untouched,
        "rows": [asdict(row) for row in rows],
    }
    _write(folder / "results.json", json.dumps(found, indent=2) + "\n")
    _write(folder / "results.md", render(rows, setting, env, untouched))
    write_plots(rows, setting.get("given", {}), folder)
    return rows


def _given(jobs: Sequence[Job]) -> dict[str, Any]:
    """What the flags that --vary names are where they are not varied; nothing without it."""
    keys = dict.fromkeys(job.variation.key for job in jobs if job.variation is not None)
    usual = next((job.config for job in jobs if job.trains and job.variation is None), None)
    if not keys or usual is None:
        return {}
    return {"given": {key: getattr(usual, key) for key in keys}}


def _require_same_text(jobs: Sequence[Job]) -> None:
    """Refuse runs that were kept from before the files changed."""

    def text(job: Job) -> tuple[object, ...]:
        record = _record(job.config)
        evaluation = record["evaluation"]
        # The dense model's perplexity knows the evaluation's text; GPUs differ in the last digits.
        dense = f"{evaluation['perplexity_dense']:.4g}"
        return record["data"]["sha256"], evaluation["on"], evaluation["tokens"], dense

    for job in jobs:
        if text(job) != text(jobs[0]):
            raise RunError(
                f"output: {job.name} and {jobs[0].name} have seen different text: the files have "
                "changed since; remove those runs, or name another folder"
            )


def read_row(job: Job) -> Row:
    """The row of a finished run."""
    record, config = _record(job.config), job.config
    evaluation = record["evaluation"]
    before = evaluation.get("perplexity_before_prune")
    after = evaluation["perplexity_after_prune"]
    curve: list[Point] = []
    if job.trains:
        per_step = record["batch"] * record["context"]
        curve = [
            Point(
                tokens=entry["step"] * per_step,
                perplexity=entry["eval_perplexity"],
                pruned=entry.get("eval_perplexity_pruned"),
            )
            for entry in read_history(config.run_dir)
            if "eval_perplexity" in entry and entry["step"] < record["steps"]
        ]
        pruned = None if config.method == "dense" else after
        curve.append(Point(tokens=record["tokens"], perplexity=before, pruned=pruned))
    return Row(
        method=job.method if job.trains else f"{job.method} (one-shot)",
        checkpoint=config.output.name,
        tokens=record["tokens"],
        lr=record.get("lr"),
        lambda_=record.get("lambda") or None,
        seed=config.seed,
        perplexity_dense=evaluation["perplexity_dense"],
        perplexity_before_prune=None if config.method == "dense" else before,
        perplexity=after,
        curve=tuple(curve),
        answers=read_answers(config.output.parent, job.name) if job.questions else None,
        settings=own_settings(config),
        **_variation(job),
    )


def _variation(job: Job) -> dict[str, Any]:
    if job.variation is None:
        return {"usual": job.name}
    key = job.variation.key
    return {
        "varied": {key: getattr(job.config, key)},
        "usual": job.name.replace(f"-{job.variation.name}-", "-"),
    }


def render(
    rows: Sequence[Row],
    setting: dict[str, Any],
    env: dict[str, Any],
    untouched: dict[str, Any] | None = None,
) -> str:
    """results.md: every run, and the mean over seeds where there are several.

    Args:
        untouched: answers of the dense model as it came.
    """
    varies = any(row.varied for row in rows)
    head = (*_HEAD[:1], "otherwise", *_HEAD[1:]) if varies else _HEAD
    dense = [DENSE, "0", "", "", "", "", number(rows[0].perplexity_dense)]
    if varies:
        dense.insert(1, "")
    lines = [
        f"# {setting['model']} to {setting['pattern']}, method by method",
        "",
        f"Perplexity on {setting['evaluation_tokens']:,} tokens ({setting['evaluated_on']}), "
        f"non-overlapping windows of {setting['context']}, weights in fp32. Trained on "
        f"{', '.join(setting['data'])}. {env['gpu']}, torch {env['torch']}, commit "
        f"{env['commit']}.",
        "",
        *_table(
            (*head, *_questions(untouched)),
            [
                (*dense, *_answers(untouched)),
                *((*_cells(row, varies=varies), *_answers(row.answers)) for row in rows),
            ],
        ),
        "",
    ]
    if untouched:
        lines += [
            "The columns after it: perplexity of a file as one text, in windows of as many tokens; "
            "and the share of questions whose right answer the model finds most likely, with its "
            "standard error.",
            "",
        ]
    repeated = [_mean_cells(group) for group in _by_setting(rows) if len(group) > 1]
    if repeated:
        lines += ["Over the seeds, mean and standard deviation of the sample:", ""]
        lines += _table(("method", "lr", "lambda", "seeds", "perplexity"), repeated)
        lines.append("")
    return "\n".join(lines)


def _questions(answers: dict[str, Any] | None) -> list[str]:
    """The heads of `_answers`: what each file is called."""
    if answers is None:
        return []
    return [Path(one["file"]).stem for one in (*answers["text"], *answers["zero_shot"])]


def _answers(answers: dict[str, Any] | None) -> list[str]:
    if answers is None:
        return []
    text = [number(one["windows"]["perplexity"]) for one in answers["text"]]
    choices = [_share(one["acc"], one["acc_stderr"]) for one in answers["zero_shot"]]
    return [*text, *choices]


def _share(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _cells(row: Row, *, varies: bool) -> tuple[str, ...]:
    name = (row.method, row.otherwise) if varies else (row.method,)
    before, after = number(row.perplexity_before_prune), number(row.perplexity)
    return (*name, f"{row.tokens:,}", *_setting(row), str(row.seed), before, after)


def _mean_cells(group: Sequence[Row]) -> tuple[str, ...]:
    """Of rows that differ by their seed alone."""
    values = [row.perplexity for row in group]
    found = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
    # A default that is measured, such as CAST's lambda, may follow the seed.
    settings = [
        cells[0] if len(set(cells)) == 1 else "each its own"
        for cells in zip(*map(_setting, group), strict=True)
    ]
    name = ", ".join(filter(None, (group[0].method, group[0].otherwise)))
    return (name, *settings, str(len(group)), found)


def _setting(row: Row) -> tuple[str, str]:
    return (f"{row.lr:.3g}" if row.lr else "", f"{row.lambda_:.3g}" if row.lambda_ else "")


def _by_setting(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that were asked for with the same rate and lambda, each group of all its seeds."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        setting = row.checkpoint.removesuffix(f"-seed{row.seed}")
        groups.setdefault((row.method, setting), []).append(row)
    return list(groups.values())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if value < 1000 else f"{value:.3g}"


def _record(config: RunConfig) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((config.output / "cast.json").read_text(encoding="utf-8"))
    return record


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
