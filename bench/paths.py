"""Where benchmarks write: bench/results in a checkout, ./bench-results elsewhere."""

from pathlib import Path

# bench/ is also a link inside the package; resolved, so that a checkout is known as one.
BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent


def is_checkout() -> bool:
    return (ROOT / "pyproject.toml").exists()


RESULTS = BENCH / "results" if is_checkout() else Path("bench-results")


def known(path: Path) -> Path:
    """A result file, or what RESULTS has of its name: an --out of its own starts from that."""
    return path if path.exists() else RESULTS / path.name
