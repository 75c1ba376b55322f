"""What a run says of itself: OUTPUT.run/log.jsonl, TensorBoard, and the bar on the terminal.

log.jsonl has one object a line: "step", counted from 1, and the figures of that entry.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cast_serve.trainer.errors import RunError

_FILE = "log.jsonl"


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """The entries of a run, oldest first; none where nothing was logged."""
    path = run_dir / _FILE
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            # Cut off where the process was killed; the rest was written by its successor.
            continue
        # Or damaged: what a run logged is no reason not to go on with it.
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


class Journal:
    """The entries of the steps after `done`; those of an earlier try at them are dropped."""

    def __init__(self, run_dir: Path, console: Console, *, done: int, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        kept = [entry for entry in read_history(run_dir) if done and entry["step"] <= done]
        staging = run_dir / f"{_FILE}.part"
        self._run_dir = run_dir
        with self._writing():
            staging.write_text("".join(map(_line, kept)), encoding="utf-8")
            os.replace(staging, run_dir / _FILE)
            self._file = (run_dir / _FILE).open("a", encoding="utf-8")
            self._board = SummaryWriter(str(run_dir / "logs"), purge_step=done + 1)
        self._console = console
        self._steps = steps
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("steps", total=steps, completed=done, figures="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        # Of a run that has failed already the first error counts.
        with self._writing() if error is None else suppress(OSError):
            self._file.close()
            self._board.close()

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        self._bar.update(self._task, completed=step)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Add an entry; without a terminal it is a line of output, too."""
        with self._writing():
            self._file.write(_line({"step": step, **figures}))
            self._file.flush()
            # Written by a thread, whose errors come here with a later entry.
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)
        shown = _shown(figures)
        self._bar.update(self._task, figures=shown)
        if not self._console.is_terminal:
            self._console.print(f"step {step}/{self._steps}  {shown}", markup=False)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"output: cannot write the log in {self._run_dir} ({error.strerror}); make room "
                "and continue with --resume"
            ) from error


def _shown(figures: dict[str, float]) -> str:
    forms = {
        "loss": "loss {:.3f}",
        "sparse_weight_ratio": "S {:.4f}",
        "lr": "lr {:.1e}",
        "tokens_per_s": "{:,.0f} tokens/s",
        "eval_perplexity": "perplexity {:.2f}",
        "eval_perplexity_pruned": "pruned {:.2f}",
    }
    return "  ".join(form.format(figures[key]) for key, form in forms.items() if key in figures)


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
