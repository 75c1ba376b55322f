"""Where this user's compiled kernels and measured plans are kept."""

import os
from pathlib import Path


def user_cache() -> Path:
    """`cast-serve` in XDG_CACHE_HOME, or in ~/.cache (XDG Base Directory Specification)."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "cast-serve"
