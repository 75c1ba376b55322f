"""The state of a run after a step, on disk: torch.distributed.checkpoint, whole or not there.

    checkpoint-N/__R_0.distcp   what process R wrote: slices of weights and of the optimizer's state
    checkpoint-N/.metadata      which slice lies where
    checkpoint-N/manifest.json  step, and size and CRC-32 of every file above

Written under `.staging`, flushed to disk and renamed, so a folder of this name is complete. It can
be read by another number of processes than wrote it. Random numbers need no state: every forward
pass seeds them from run, step and process (gradient.py).
"""

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from cast_serve.trainer.errors import RunError
from cast_serve.trainer.processes import Processes
from cast_serve.trainer.run_dir import STAGING, checkpoints

_MANIFEST = "manifest.json"
_BLOCK = 1 << 24


def save(
    run_dir: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    processes: Processes,
    *,
    keep: int,
) -> Path:
    """Write checkpoint-STEP and remove all but the `keep` latest; every process must call it.

    Raises:
        RunError: it cannot be written; names the last one that was.
    """
    staging, target = run_dir / STAGING, run_dir / f"checkpoint-{step}"
    processes.on_first(lambda: _empty(staging))
    weights, state = get_state_dict(model, optimizer)
    try:
        with _quiet():
            dcp.save(
                {"model": weights, "optimizer": state},
                checkpoint_id=staging,
                no_dist=processes.count == 1,
            )
    except CheckpointException as error:
        if _is_interrupt(error):
            # Not on_first: the others may not come here.
            if processes.is_first:
                shutil.rmtree(staging, ignore_errors=True)
            raise KeyboardInterrupt from error
        processes.on_first(lambda: shutil.rmtree(staging, ignore_errors=True))
        raise RunError(_cannot_save(run_dir, step, error)) from error
    digests = _gather(_digests(staging, processes.rank), processes)
    processes.on_first(lambda: _publish(staging, target, step, digests, keep))
    return target


def load(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes
) -> int:
    """Read a checkpoint into `model` and `optimizer`; returns its step.

    Raises:
        RunError: it is damaged or of another model; names file, and the checkpoint before it.
    """
    step = processes.on_first(lambda: _verify(folder))
    weights, state = get_state_dict(model, optimizer)
    try:
        with _quiet():
            dcp.load(
                {"model": weights, "optimizer": state},
                checkpoint_id=folder,
                no_dist=processes.count == 1,
            )
    except CheckpointException as error:
        if _is_interrupt(error):
            raise KeyboardInterrupt from error
        raise RunError(_damaged(folder, _reason(error))) from error
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return step


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that there is one process only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _empty(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise RunError(f"output: cannot write {folder}: {error.strerror}") from error


def _publish(staging: Path, target: Path, step: int, digests: dict[str, Any], keep: int) -> None:
    run_dir = target.parent
    try:
        with (staging / _MANIFEST).open("w", encoding="utf-8") as file:
            json.dump({"step": step, "files": digests}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        _flush(staging)
        # Left by a run that was resumed from an earlier one: os.replace needs an empty target.
        shutil.rmtree(target, ignore_errors=True)
        os.replace(staging, target)
        _flush(run_dir)
    except OSError as error:
        raise RunError(_cannot_save(run_dir, step, error)) from error
    for old in checkpoints(run_dir)[:-keep]:
        # First the name: one that is half removed must not look complete.
        doomed = old.with_name(f".{old.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digests(folder: Path, rank: int) -> dict[str, list[int]]:
    """Size and CRC-32 of the files of process `rank`; the first one has the metadata, too."""
    names = [path.name for path in folder.glob(f"__{rank}_*.distcp")]
    names += [".metadata"] if rank == 0 else []
    return {name: _digest(folder / name) for name in sorted(names)}


def _digest(path: Path) -> list[int]:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return [path.stat().st_size, crc]


def _gather(own: dict[str, list[int]], processes: Processes) -> dict[str, list[int]]:
    if processes.count == 1:
        return own
    every: list[Any] = [None] * processes.count
    distributed.all_gather_object(every, own)
    return {name: digest for one in every for name, digest in one.items()}


def _verify(folder: Path) -> int:
    """The step of a checkpoint whose files are as they were written."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        files, step = dict(manifest["files"]), int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(_damaged(folder, f"{_MANIFEST}: {error!r}")) from error
    for name, written in files.items():
        try:
            found = _digest(folder / name)
        except OSError as error:
            raise RunError(_damaged(folder, f"{name}: {error.strerror}")) from error
        if found != written:
            raise RunError(_damaged(folder, f"{name} is not what was written"))
    return step


def _damaged(folder: Path, reason: str) -> str:
    before = [path for path in checkpoints(folder.parent) if path != folder]
    remedy = f"remove it to resume from {before[-1].name}" if before else "start the run again"
    return f"resume: {folder} is damaged: {reason}; {remedy}"


def _cannot_save(run_dir: Path, step: int, error: BaseException) -> str:
    last = checkpoints(run_dir)
    saved = f"the last one is {last[-1]}" if last else "there is none before it"
    free = shutil.disk_usage(run_dir).free
    return (
        f"output: checkpoint-{step} cannot be written to {run_dir} ({_reason(error)}; "
        f"{free / 1e9:.1f} GB free); {saved}: make room and continue with --resume"
    )


def _is_interrupt(error: CheckpointException) -> bool:
    """Whether it is Ctrl-C, which torch wraps as if writing or reading had failed."""
    return any(isinstance(inner, KeyboardInterrupt) for inner, _ in error.failures.values())


def _reason(error: BaseException) -> str:
    """The first process' own error, which torch wraps."""
    if isinstance(error, CheckpointException):
        rank, (inner, _) = next(iter(error.failures.items()))
        return f"process {rank}: {type(inner).__name__}: {inner}"
    return getattr(error, "strerror", None) or str(error)
