"""An error that every process of a run finds is printed by the first; that of another by itself.

Processes know of each other's errors through the store of torchrun's agent, which lives longer than
they do. Where there is none, each prints its own.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

# For the first process to come to the same error: all of them are about equally fast.
_PATIENCE = timedelta(seconds=10)


def say_once(message: str, say: Callable[[str], None]) -> None:
    """Say `message`, unless the first process has said, or soon says, the very same."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        say(message)
    elif os.environ["RANK"] == "0":
        # Before the others know: the first one to exit ends all others.
        say(message)
        _tell(message)
    elif _first_said() != message:
        say(message)


def _tell(message: str) -> None:
    try:
        _store().set(_key(), message)
    except RuntimeError:
        # The others say it, too.
        return


def _first_said() -> str | None:
    try:
        return _store().get(_key()).decode()
    except RuntimeError:
        # There is no store, or no word from the first process.
        return None


def _store() -> "TCPStore":
    # Here, because torch takes seconds to import and --help must not wait for it.
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=_PATIENCE, wait_for_workers=False)


def _key() -> str:
    return f"cast-train/error/{os.environ['TORCHELASTIC_RESTART_COUNT']}"
