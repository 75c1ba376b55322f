"""Where this user's measured plans (`plans`) and compiled kernels (`cubin`) are kept.

$XDG_CACHE_HOME/cast-serve, or ~/.cache/cast-serve where that is unset, empty or relative (XDG Base
Directory Specification). All of it can be deleted: it is made again at the next start.
"""

import os
from pathlib import Path


def user_cache() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".cache") / "cast-serve"
