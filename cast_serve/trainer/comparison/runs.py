"""How the runs of a comparison are carried out: one after the other, or several at once.

At once, each is a process of its own, the same command with --only NAME, on the GPU that has the
fewest of them. What it prints is in OUTPUT/NAME.log.
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from cast_serve.trainer.comparison.answers import evaluate_once
from cast_serve.trainer.comparison.jobs import Comparison, Job
from cast_serve.trainer.errors import RunError

# A job that has ended, and why it failed; None: it did not.
Ending = tuple[Job, str | None]

# How often to look whether a run has ended, in seconds; its imports alone take longer.
_LOOK = 0.2


def carry_out(
    comparison: Comparison, arguments: Sequence[str], console: Console
) -> Generator[Ending, None, None]:
    """Each job as it ends. Closing the generator ends what is under way; it can be continued.

    Args:
        arguments: of the comparison, as they stand after `cast-train compare`.

    Raises:
        RunError: a log cannot be written.
    """
    jobs, at_once = comparison.jobs, comparison.at_once
    if at_once == 1 or len(jobs) == 1:
        yield from _one_by_one(jobs, console)
        return
    finished = [job for job in jobs if job.finished]
    yield from _one_by_one(finished, console)
    rest = [job for job in jobs if job not in finished]
    with _terminated_as_interrupted():
        yield from _side_by_side(rest, arguments, at_once, console)


def ask(job: Job, model: Path, name: str) -> None:
    """Have `model` answer the comparison's questions, once, as `name`."""
    if job.questions:
        evaluate_once(job.questions, model, name, job.config)
        _forget_model()


def _one_by_one(jobs: Sequence[Job], console: Console) -> Iterator[Ending]:
    """In this process; of those that are finished only new questions are asked."""
    for job in jobs:
        state = "finished before" if job.finished else "starting"
        console.print(f"{job.name}: {state}", markup=False)
        try:
            if not job.finished:
                _train_or_prune(job, console)
            ask(job, job.config.output, job.name)
        except RunError as error:
            # A rate that diverges is a finding about one method; the others are still wanted.
            yield job, str(error)
        else:
            yield job, None


def _side_by_side(
    jobs: Sequence[Job], arguments: Sequence[str], at_once: int, console: Console
) -> Iterator[Ending]:
    """In processes. The next one has been started when one that ended is yielded."""
    waiting = deque(jobs)
    running: list[_Run] = []
    try:
        while waiting or running:
            ended = [run for run in running if run.process.poll() is not None]
            running = [run for run in running if run not in ended]
            while waiting and len(running) < at_once:
                job = waiting.popleft()
                gpu = _least_used(_gpus(job.config.device), running)
                running.append(_Run.start(job, arguments, gpu, at_once))
                console.print(f"{job.name}: starting, see {running[-1].log}", markup=False)
            for run in ended:
                yield run.job, run.failure()
            if not ended:
                time.sleep(_LOOK)
    finally:
        for run in running:
            run.process.terminate()
        for run in running:
            run.process.wait()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """A job in a process of its own. `gpu` as in CUDA_VISIBLE_DEVICES; None: on the CPU."""

    job: Job
    process: subprocess.Popen[bytes]
    gpu: str | None
    log: Path

    @classmethod
    def start(cls, job: Job, arguments: Sequence[str], gpu: str | None, at_once: int) -> "_Run":
        """Begin. The log of an earlier try at the job is added to."""
        environment = dict(os.environ)
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        # Each would start a thread for every core.
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // at_once)))
        command = [sys.executable, "-m", "cast_serve.trainer.main", "compare", *arguments]
        log = job.config.output.with_name(f"{job.name}.log")
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                process = subprocess.Popen(
                    [*command, "--only", job.name],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
        except OSError as error:
            raise RunError(f"output: cannot write {log} ({error.strerror})") from error
        return cls(job=job, process=process, gpu=gpu, log=log)

    def failure(self) -> str | None:
        """Why it failed, now that it has ended: the last that it said."""
        status = self.process.returncode
        if status == 0:
            return None
        if status < 0:
            return f"ended by {signal.Signals(-status).name}; see {self.log}"
        said = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return said[-1].removeprefix("cast-train compare: error: ")


def _least_used(gpus: Sequence[str | None], running: Sequence[_Run]) -> str | None:
    taken = Counter(run.gpu for run in running)
    return min(gpus, key=lambda gpu: taken[gpu])


def _gpus(device: str) -> list[str | None]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them; [None] for the CPU."""
    import torch

    from cast_serve.trainer.processes import takes_gpu

    if not takes_gpu(device):
        return [None]
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [*(given.split(",") if given else map(str, range(torch.cuda.device_count())))]


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does: there are processes to end."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _train_or_prune(job: Job, console: Console) -> None:
    from cast_serve.trainer.methods.untrained import prune_without_training
    from cast_serve.trainer.run_dir import held
    from cast_serve.trainer.train import run

    config = replace(job.config, resume=(job.config.run_dir / "run.json").is_file())
    if job.trains:
        run(config, console)
    else:
        with held(config):
            prune_without_training(config)
    _forget_model()


def _forget_model() -> None:
    """Leave nothing of a model to the next one.

    Hooks make reference cycles, which would stay on the GPU. And torch.compile takes a model of the
    same classes for the same code, whose recompilations it counts: the third would run uncompiled.
    """
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.compiler.reset()
