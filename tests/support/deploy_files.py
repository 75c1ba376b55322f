"""What deploy/ holds, and a copy of one of its files with a line changed."""

from pathlib import Path

DEPLOY = Path(__file__).parents[2] / "deploy"


def changed(file: Path, folder: Path, old: str, new: str) -> Path:
    """A copy in `folder` in which `old`, which is there once, reads `new`."""
    text = file.read_text()
    assert text.count(old) == 1, f"{old!r} is in {file} {text.count(old)} times"
    copy = folder / file.name
    copy.write_text(text.replace(old, new))
    return copy
