"""cast-train: the command. Errors a user can put right are one line on stderr and exit status 2.

`cast-train --model ...` trains; `cast-train NAME ...` is one of the commands of commands.py.
"""

import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec

from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.trainer.arguments import parse
from cast_serve.trainer.commands import find_command
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.said_once import say_once

_RESUME = "; if OUTPUT.run exists, --resume continues from its last checkpoint"
_EXTRA = ("datasets", "tensorboard", "matplotlib")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run cast-train; returns its exit status."""
    from rich.console import Console

    arguments = sys.argv[1:] if arguments is None else arguments
    # No flag takes a word before it: what does not start with a dash names a command.
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    program = f"cast-train {name}" if name else "cast-train"
    # highlight=False: rich would colour parts of numbers and paths.
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    say = partial(errors.print, markup=False)
    try:
        return _command(name, arguments[1:]) if name else _train(arguments)
    except (RunError, CheckpointError) as error:
        say_once(f"{program}: error: {error}", say)
        return 2
    except KeyboardInterrupt:
        say_once(f"{program}: interrupted{_RESUME if not name else ''}", say)
        return 130


def _command(name: str, arguments: Sequence[str]) -> int:
    command = find_command(name)
    # Unset or empty: not of several.
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise RunError(f"{name} is one process: start it without torchrun or accelerate launch")
    return command(arguments)


def _train(arguments: Sequence[str]) -> int:
    config = parse(arguments)
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise RunError(
            f"training needs {', '.join(missing)}; install it: pip install 'cast-serve[train]'"
        )
    # Here, because transformers takes seconds to import and --help must not wait for it.
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from cast_serve.trainer.train import run

    # Bars of loading and of every checkpoint's shards would break up the one of the steps.
    disable_progress_bar()
    run(config, Console(highlight=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
