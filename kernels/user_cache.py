"""Where this user's measured plans (`plans`) and compiled kernels (`cubin`) are kept.

$XDG_CACHE_HOME/cast-serve, or ~/.cache/cast-serve where that is unset, empty or relative (XDG Base
Directory Specification). All of it can be deleted: it is made again at the next start.
"""

import os
import tempfile
from pathlib import Path


def user_cache() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".cache") / "cast-serve"


def write_whole(path: Path, content: bytes) -> None:
    """Write `path` whole or not at all, with the folders above it; several processes may at once.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        part.write_bytes(content)
        part.replace(path)
