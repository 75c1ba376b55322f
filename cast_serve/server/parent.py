"""Who ends with whom: what a process asks Linux for its parent's sake, and for its children's."""

import ctypes
import signal


def end_with_parent() -> None:
    """Ask Linux for SIGTERM should this process's parent be killed: prctl(2), PR_SET_PDEATHSIG.

    In the child, before it holds anything.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own has ended: PR_SET_CHILD_SUBREAPER.

    So none is lost from sight, also of those that have left the process group.
    """
    ctypes.CDLL(None).prctl(36, 1)
