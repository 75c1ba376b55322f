"""Processes that end with the one that started them."""

import ctypes
import signal


def end_with_parent() -> None:
    """Ask Linux for SIGTERM should this process's parent be killed: prctl(2), PR_SET_PDEATHSIG.

    In the child, before it holds anything.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
