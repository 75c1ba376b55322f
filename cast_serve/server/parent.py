"""Who ends with whom: what a process asks Linux for its parent's sake, and for its children's."""

import ctypes
import os
import signal


def end_with_parent(parent: int) -> None:
    """Ask Linux for SIGTERM should this process's parent be killed: prctl(2), PR_SET_PDEATHSIG.

    In the child, before it holds anything. Exits where the parent, the process `parent`, is gone
    already: Linux tells nobody of a death before the asking.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own has ended: PR_SET_CHILD_SUBREAPER.

    So none is lost from sight, also of those that have left the process group.
    """
    ctypes.CDLL(None).prctl(36, 1)
