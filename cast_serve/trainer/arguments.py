"""Flags and YAML to a RunConfig: a flag wins over the file, the file over the default.

Both go through the same conversion, so `lr: 1e-4` works in YAML too (YAML 1.1 reads it as text).
"""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from cast_serve.trainer.commands import COMMANDS
from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.config_checks import key_of
from cast_serve.trainer.data_source import DataSource
from cast_serve.trainer.errors import RunError

_METAVARS = {Path: "DIR", int: "N", float: "X"}
_GROUPS = {
    "run": "run",
    "method": "method (CAST, arXiv 2509.25996)",
    "budget": "budget",
    "optimizer": "optimizer",
    "output": "output",
    "action": "actions",
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are RunErrors; for cast-train and each of its subcommands."""

    def error(self, message: str) -> NoReturn:
        raise RunError(f"{message}; {self.prog} --help lists the flags")


def build_parser() -> argparse.ArgumentParser:
    """The parser of cast-train; its result holds the flags that were given and no defaults."""
    parser = Parser(
        prog="cast-train",
        description="Train a dense language model to N:M sparsity with CAST, ready for cast-serve.",
        epilog="A key of the YAML file is a flag with underscores: --batch-size is batch_size. "
        "Errors are one line on stderr and exit status 2. "
        f"Other commands, each with its own --help: {', '.join(COMMANDS)}.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="YAML", help="file with any of these keys")
    groups = {key: parser.add_argument_group(title) for key, title in _GROUPS.items()}
    hints = get_type_hints(RunConfig)
    for option in fields(RunConfig):
        _add(groups[option.metadata["group"]], option, _bare(hints[option.name]))
    return parser


def parse(arguments: Sequence[str] | None = None) -> RunConfig:
    """RunConfig of a command line.

    Raises:
        RunError: unknown key, wrong type, impossible or missing value; names the key.
        SystemExit: --help.
    """
    values = given_values(arguments)
    for option in fields(RunConfig):
        if option.default is MISSING and option.name not in values:
            raise RunError(f"{option.name}: missing; give --{option.name} or set it in --config")
    return RunConfig(**values)


def given_values(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """What a command line and its --config set, converted and named as RunConfig names them.

    Raises:
        RunError, SystemExit: as `parse`, but for what is missing or impossible together.
    """
    given = vars(build_parser().parse_args(arguments))
    path = given.pop("config", None)
    values = read_yaml(path) if path is not None else {}
    hints = get_type_hints(RunConfig)
    return values | {name: _convert(name, value, hints[name]) for name, value in given.items()}


def read_yaml(path: Path) -> dict[str, Any]:
    """Fields set by a YAML file, converted and named as RunConfig names them.

    Raises:
        RunError: no such file, not YAML, not a mapping, unknown key, wrong type.
    """
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"config: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"config: {path} is not YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise RunError(f"config: {path} must hold `key: value` lines, found a {_kind(loaded)}")
    names = {key_of(option.name): option.name for option in fields(RunConfig)}
    hints = get_type_hints(RunConfig)
    values = {}
    for key, value in loaded.items():
        if key not in names:
            raise RunError(f"config: {path}: unknown key {key!r}; known: {', '.join(names)}")
        values[names[key]] = _convert(names[key], value, hints[names[key]])
    return values


def _add(group: Any, option: Field[Any], kind: Any) -> None:
    flag = "--" + key_of(option.name).replace("_", "-")
    settings: dict[str, Any] = {"dest": option.name, "help": _help(option)}
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif get_origin(kind) is tuple:
        settings |= {"nargs": "+", "metavar": "SOURCE"}
    elif get_origin(kind) is Literal:
        settings["metavar"] = "|".join(get_args(kind))
    else:
        settings["metavar"] = option.metadata["metavar"] or _METAVARS[kind]
    group.add_argument(flag, **settings)


def _help(option: Field[Any]) -> str:
    text = option.metadata["help"]
    if option.default is MISSING or any(option.default is empty for empty in (None, (), False)):
        return text
    shown = f"{option.default:.3g}" if isinstance(option.default, float) else option.default
    return f"{text} (default {shown})"


def _bare(hint: Any) -> Any:
    """`X` of `X | None`."""
    if get_origin(hint) is UnionType:
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _convert(name: str, value: Any, hint: Any) -> Any:
    """`value`, from a flag's text or YAML, as the type of its field."""
    key, kind = key_of(name), _bare(hint)
    if value is None and kind is not hint:
        return None
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise RunError(f"{key}: {value!r} is not possible; use {', '.join(get_args(kind))}")
        return value
    if get_origin(kind) is tuple:
        if isinstance(value, dict):
            # YAML's way to write weights: `data: {books.txt: 0.3, wiki.jsonl: 0.7}`.
            return tuple(
                DataSource(place=str(place), weight=_number(f"{key}: {place}", weight, float))
                for place, weight in value.items()
            )
        items = value if isinstance(value, list) else [value]
        return tuple(_convert(name, item, get_args(kind)[0]) for item in items)
    if kind is bool:
        if not isinstance(value, bool):
            raise RunError(f"{key}: expected true or false, got {value!r}")
        return value
    if kind in (int, float):
        return _number(key, value, kind)
    if not isinstance(value, str):
        hint_text = "; quote it (YAML reads 2:4 as the base-60 number 124)" if kind is str else ""
        raise RunError(f"{key}: expected text, got {_kind(value)} {value!r}{hint_text}")
    if not value:
        raise RunError(f"{key}: is empty")
    return DataSource.parse(value) if kind is DataSource else kind(value)


def _number(key: str, value: Any, kind: type[int] | type[float]) -> int | float:
    wanted = "a whole number" if kind is int else "a number"
    error = RunError(f"{key}: expected {wanted}, got {value!r}")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise error
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise error from None
    if number != number or (kind is int and number not in (float("inf"),) and number % 1):
        raise error
    if kind is float:
        return number
    if number == float("inf"):
        raise error
    # Large whole numbers lose digits as floats; "1e9" has no other reading.
    return value if isinstance(value, int) else _whole(value, number)


def _whole(value: float | str, number: float) -> int:
    return int(value) if isinstance(value, str) and value.lstrip("+-").isdecimal() else int(number)


def _kind(value: Any) -> str:
    return {dict: "mapping", list: "list", int: "number", float: "number", bool: "boolean"}.get(
        type(value), type(value).__name__
    )
