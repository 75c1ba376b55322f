"""OUTPUT.run, the folder of a run in progress: what it is, and its last complete checkpoint.

run.json         configuration, values fixed at the start, digest of the data
checkpoint-N/    the state after step N (checkpoint.py); complete once it has this name
.staging/        a checkpoint being written
log.jsonl        the figures of every entry (journal.py)
logs/            TensorBoard
plots/           PNG, at the end
teacher/         a cached teacher's top tokens
importance.safetensors    norms of the layers' inputs, where masks take them into account
.lock            of the one process that writes all this, as long as it does
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.config_checks import unread_defaults
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.lock import lock
from cast_serve.trainer.output import require_free, require_writable

STAGING = ".staging"
IMPORTANCE = "importance.safetensors"
_LOCK = ".lock"
# 1 had checkpoints of transformers.Trainer.
_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Values that a run settles once and keeps when it is resumed."""

    steps: int
    context: int
    sequences_per_step: int
    lr: float
    lambda_: float
    data_sha256: str
    # Loss of the untouched dense model on the evaluation blocks, nats per token.
    dense_loss: float
    # Of the data sets of the hub, by name.
    hub_commits: dict[str, str] = field(default_factory=dict)
    # Of the text that dense_loss is of, and of the dense model (source.py); empty in runs that were
    # begun without them.
    evaluation_sha256: str = ""
    dense_sha256: str = ""


@contextmanager
def held(config: RunConfig) -> Iterator[None]:
    """The folders of a run, checked, and this process' alone until the end of the block.

    Two that write one run would empty each other's .staging. A dry run writes nothing: it holds
    nothing either.

    Raises:
        RunError: as check_folders; another process holds them; they cannot be written.
    """
    if config.dry_run or not config.run_dir.is_dir():
        # First: a run that is refused makes no folder.
        check_folders(config)
    if config.dry_run:
        yield
        return
    with lock(config.run_dir / _LOCK, of=config.run_dir, command="cast-train"):
        try:
            # Until it was locked, another process may have written.
            check_folders(config)
            require_writable(config.output)
            yield
        finally:
            # Before it is released: after that, another process may have it.
            with suppress(OSError):
                (config.run_dir / _LOCK).unlink()
                # Holds something, unless the run did not come to its first step.
                config.run_dir.rmdir()


def check_folders(config: RunConfig) -> None:
    """Refuse to overwrite a model or a run, to write into one, and to resume what is not there.

    Raises:
        RunError: says which folder, and what to do.
    """
    output, run_dir = config.output, config.run_dir
    for folder in (output, run_dir):
        if folder.exists() and not folder.is_dir():
            raise RunError(f"output: {folder} is a file; name another folder or remove it")
    if os.path.ismount(output.resolve()):
        raise RunError(
            f"output: {output} is a mount point, and what is written replaces the folder; name one "
            f"in it, such as {output / 'sparse'}"
        )
    if config.resume:
        if not (run_dir / "run.json").is_file():
            raise RunError(f"resume: {run_dir} holds no run; leave --resume out to start one")
        return
    require_free(output, source=config.model)
    # There before the run is recorded, and left where that was cut off.
    early = ("teacher", IMPORTANCE, f"{IMPORTANCE}.part", "run.json.part", _LOCK)
    if run_dir.exists() and any(path.name not in early for path in run_dir.iterdir()):
        raise RunError(
            f"output: {run_dir} holds an earlier run; continue it with --resume or remove it"
        )


def write_run(config: RunConfig, fixed: Fixed) -> None:
    """Record a run before its first step.

    Raises:
        RunError: the folder cannot be written.
    """
    record = {"format": _FORMAT, "config": config.identity(), "fixed": asdict(fixed)}
    staging = config.run_dir / "run.json.part"
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        staging.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(staging, config.run_dir / "run.json")
    except OSError as error:
        raise RunError(f"output: cannot write {config.run_dir}: {error.strerror}") from error


def read_run(config: RunConfig) -> Fixed:
    """Values fixed by the run that `config` resumes.

    Raises:
        RunError: run.json is damaged, or the configuration is not the one that started the run.
    """
    path = config.run_dir / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        form = record["format"]
        if form != _FORMAT:
            raise RunError(
                f"resume: {path} has format {form}, and this cast-train reads {_FORMAT}; finish it "
                "with the version that started it"
            )
        # A key that the version it was started with did not have was what is now its default.
        before = config.identity_defaults() | record["config"]
        fixed = Fixed(**record["fixed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"resume: {path} cannot be read: {error!r}") from error
    now = config.identity()
    changed = [
        f"{key} was {_shown(before.get(key))}, is {_shown(now.get(key))}"
        # Runs were begun with keys that their method does not look at.
        for key in sorted({*before, *now} - unread_defaults(config.method, config).keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise RunError(
            f"resume: the run was started with another configuration: {'; '.join(changed)}; "
            "use the same, or start a new run with another --output"
        )
    return fixed


def last_checkpoint(run_dir: Path) -> Path | None:
    """The complete checkpoint with the most steps; None before the first."""
    complete = checkpoints(run_dir)
    return complete[-1] if complete else None


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints by step; one being written lies in .staging until its rename."""
    found = []
    for path in run_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def _shown(value: Any) -> str:
    return "the default" if value is None else json.dumps(value)
