"""cast-bench: each benchmark by its name, its arguments passed on."""

import subprocess
import sys

import pytest

from cast_serve.bench.cli import COMMANDS, main
from cast_serve.bench.paths import ROOT


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("linear", "--all-kernels"),
        ("latency", "--iterations"),
        ("throughput", "--requests"),
        ("load", "--checkpoints"),
        ("optim", "--repeats"),
        ("serve", "--workloads"),
    ],
)
def test_help_is_the_benchmarks(name: str, own: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: cast-bench {name} ") and own in printed


def test_help_names_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in COMMANDS)


def test_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["speed"])
    assert ended.value.code == 2
    assert "invalid choice: 'speed'" in capsys.readouterr().err


def test_status_and_arguments_are_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", "gpt-5"]) == 2
    assert capsys.readouterr().err.startswith("bench_serve: no model 'gpt-5'")


def test_from_a_checkout() -> None:
    """bench/ is no package of its own there, and runs as one."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.bench_serve", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: cast-bench serve ")
