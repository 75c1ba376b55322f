"""Copies of this checkout, to build in: what setuptools leaves in `build` is in the next wheel."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def git(*arguments: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def tracked_files() -> list[str]:
    return git("ls-files").splitlines()


def copy_files(folder: Path) -> Path:
    """The files as they are now, but for what git ignores; returns `folder`."""
    for name in git("ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def copy_checkout(folder: Path) -> Path:
    """The same, with the history that the version comes from; returns `folder`."""
    git("clone", "--quiet", "--no-checkout", str(ROOT), str(folder))
    copy_files(folder)
    # An sdist holds what git tracks.
    git("add", "--all", cwd=folder)
    return folder
