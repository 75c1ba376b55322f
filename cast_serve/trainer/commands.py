"""The subcommands of cast-train: `cast-train NAME ...` is NAME's own main.

A main takes the arguments after its name and returns the exit status; its parser is an
arguments.Parser with prog="cast-train NAME". RunError and CheckpointError may leave it: main.py
makes them one line on stderr and exit status 2. Modules are imported when their command runs, so
none slows another's --help down.
"""

from collections.abc import Callable, Sequence
from pkgutil import resolve_name
from typing import cast

from cast_serve.trainer.errors import RunError

Command = Callable[[Sequence[str]], int]

# name: "module:function"
COMMANDS = {
    "compare": "cast_serve.trainer.comparison.main:main",
    "estimate": "cast_serve.trainer.estimate:main",
    "evaluate": "cast_serve.trainer.evaluation.command:main",
    "finetune": "cast_serve.trainer.finetune.main:main",
    "generate": "cast_serve.trainer.generation.main:main",
    "prune": "cast_serve.trainer.oneshot.command:main",
    "scaling": "cast_serve.trainer.scaling.main:main",
}


def find_command(name: str) -> Command:
    """The main of subcommand `name`.

    Raises:
        RunError: there is no such command.
    """
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise RunError(
            f"{name!r} is no command; known: {known}; training starts with flags alone: "
            "cast-train --model DIR --data FILE --output DIR"
        )
    return cast(Command, resolve_name(COMMANDS[name]))
