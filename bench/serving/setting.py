"""What a comparison of engines runs on: the machine, the engines that it has, and where logs go."""

import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cast_serve.bench import environment
from cast_serve.bench.paths import known
from cast_serve.bench.report import print_environment
from cast_serve.bench.result_file import ResultFile, RowType
from cast_serve.bench.serving.arguments import refuse_forced_kernel
from cast_serve.bench.serving.engines import Engine, find_engines


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Checked; nothing has been started.

    Attributes:
        left_out: by engine, why it cannot run here.
    """

    env: dict[str, Any]
    engines: tuple[Engine, ...]
    left_out: dict[str, str]
    logs: Path

    @classmethod
    def find(cls, *, engines: str, commit: str | None, logs: Path | None) -> "Setting":
        """That of the command line's --engines, --commit and --logs.

        Raises:
            ValueError: there is no such engine, or CAST_SERVE_KERNEL would be measured.
        """
        env = environment.describe_in_child(commit=commit)
        on_gpu = environment.on_gpu(env)
        found, left_out = find_engines(engines, on_gpu=on_gpu)
        refuse_forced_kernel(on_gpu=on_gpu)
        logs = logs or Path(tempfile.mkdtemp(prefix="cast-bench-"))
        return cls(env=env, engines=found, left_out=left_out, logs=logs)

    @property
    def on_gpu(self) -> bool:
        return environment.on_gpu(self.env)

    def result_path(self, benchmark: str, out: Path) -> Path:
        """The result file of `benchmark` for this GPU, under `out`."""
        return out / f"{benchmark}-{environment.slug(self.env['gpu'])}.json"

    def earlier(
        self, path: Path, load: Callable[[Path], ResultFile[RowType]]
    ) -> ResultFile[RowType]:
        """What is known of `path`, to go on from: rows that this run's can be compared with.

        Others are counted on stderr; the file that is written has them no longer.

        Raises:
            ResultError: the file there is holds something else.
        """
        file = known(path)
        found = load(file)
        kept = found.comparable(self.env)
        if left := len(found.rows) - len(kept.rows):
            print(
                f"{left} rows of {file} are of another machine or other versions, and not "
                f"compared with: {found.ran_on()}",
                file=sys.stderr,
            )
        return kept

    def begin(self, console: Console) -> None:
        """Print it; from now on SIGTERM and Ctrl-C end what is started, and without a traceback."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
        print_environment(self.env, console)
        console.print(f"logs         {self.logs}", markup=False)
        for name, reason in self.left_out.items():
            console.print(f"{name} is left out: {reason}")
