"""One writer of an output at a time."""

import fcntl
import logging
import os
from pathlib import Path
from typing import IO

from cast_serve.trainer.errors import RunError

logger = logging.getLogger(__name__)


def lock(path: Path, *, of: Path, command: str) -> IO[str]:
    """The file `path`, locked until it is closed: by the system, if the process is killed.

    Args:
        of: what it is the lock of, for messages.
        command: what writes that.

    Raises:
        RunError: another process holds it, or it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise RunError(f"output: cannot write {of}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise RunError(
            f"output: another {command} is writing {of}; wait for it, or end it"
        ) from error
    except OSError as error:
        # Not every network file system can.
        logger.warning(
            "%s cannot be locked (%s): start no second %s on it", of, error.strerror, command
        )
    if os.fstat(file.fileno()).st_nlink:
        return file
    # Removed by a process that ended before it was locked here: it keeps nobody out.
    file.close()
    return lock(path, of=of, command=command)
