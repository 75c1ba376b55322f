"""What a result says of the code that it is of."""

import subprocess

import pytest

from cast_serve.bench import environment


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with one commit; returns its root and the commit."""
    for name in ("bench/results/linear.json", "README.md", "kernels/op.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    git = ("git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org")
    for command in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "m")):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "is_checkout", lambda: True)
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, stdout=subprocess.PIPE, text=True
    )
    return tmp_path, head.stdout.strip()


def test_what_an_earlier_benchmark_wrote_is_no_change(checkout):
    root, head = checkout
    (root / "bench/results/linear.json").write_text("2\n")
    (root / "README.md").write_text("2\n")
    assert environment.describe(None)["commit"] == head


def test_changed_code_is_marked(checkout):
    root, head = checkout
    (root / "kernels/op.py").write_text("2\n")
    assert environment.describe(None)["commit"] == f"{head[:12]}-dirty"
