"""Values of command lines that several benchmarks take."""

import argparse
import os
from pathlib import Path


def writable_folder(given: str) -> Path:
    """A folder that is there or can be made, of argparse's `type`: found out before the hours.

    Raises:
        argparse.ArgumentTypeError: it cannot be written to; says what is in the way.
    """
    path = Path(given)
    try:
        there = next(place for place in (path, *path.absolute().parents) if place.exists())
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror}") from error
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{there} cannot be written to")
    return path


def require_one(flag: str, given: int) -> None:
    """Refuse a count below 1.

    Raises:
        ValueError: names `flag`.
    """
    if given < 1:
        raise ValueError(f"{flag} {given}: needs 1 or more")


def numbers(flag: str, given: str) -> list[int]:
    """Numbers from 1 on, from "1,8".

    Raises:
        ValueError: something else; names `flag`.
    """
    found = given.split(",")
    if not all(number.isdecimal() and int(number) for number in found):
        raise ValueError(f"{flag} {given}: needs numbers from 1 on, such as 1,8")
    return [int(number) for number in found]
