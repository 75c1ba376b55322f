"""bench_serve: its command line, and one run of real servers."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cast_serve.bench.bench_serve import main, parse
from cast_serve.bench.serving.results import load


@pytest.fixture(autouse=True)
def temporary_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_parse(tmp_path: Path) -> None:
    options = parse(["--model", "TINY", "--workloads", "c1,smoke", "--", "--enforce-eager"])
    assert options.model.name == "tiny"
    assert [workload.name for workload in options.workloads] == ["c1", "smoke"]
    assert options.flags == ("--enforce-eager",)
    assert options.logs.is_dir() and options.logs.parent == tmp_path


def test_parse_default() -> None:
    options = parse([])
    assert options.model.name == "Llama-3.1-8B"
    assert options.engines == "dense-bf16,dense-fp8,sparse-bf16"
    assert [workload.name for workload in options.workloads] == [
        *("c1", "c4", "c16", "c64", "c128"),
        *("prefill-2048", "prefill-8192", "mixed"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "c2"], "no workload 'c2'"),
        (["--repeats", "0"], "--repeats 0: needs 1 or more"),
        (["--engines", "sparse"], "no engine 'sparse'"),
        (["--breakdown", "mixed"], "--breakdown mixed: its steps differ from each other"),
    ],
)
def test_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"bench_serve: {message}")


@pytest.mark.engine
@pytest.mark.slow
def test_run(tmp_path: Path) -> None:
    """On a CPU, with the sparse op itself. One engine, for the time; breakdowns need a GPU.

    Eager: compiling would take most of the time.
    """
    command = [sys.executable, "-m", "cast_serve.bench.cli", "serve", "--model", "tiny"]
    command += ["--workloads", "smoke", "--repeats", "2", "--breakdown", "smoke"]
    command += ["--engines", "dense-fp8,sparse-bf16", "--commit", "abc"]
    command += ["--out", str(tmp_path / "out"), "--logs", str(tmp_path / "logs")]
    done = subprocess.run(
        [*command, "--", "--enforce-eager"],
        capture_output=True,
        text=True,
        env={**os.environ, "CAST_SERVE_KERNEL": "reference"},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    # vLLM wrote its trace, and the steps in it are a CPU's.
    no_step = "no step with 0 requests in prefill and 4 in decode; there are no steps on a GPU"
    assert summary["left_out"] == {
        "dense-fp8": "vLLM quantizes to FP8 on GPUs only",
        "sparse-bf16 breakdown of smoke": no_step,
    }
    results = load(tmp_path / "out" / "serve-cpu.json")
    (row,) = results.rows
    assert (row.engine, row.repeats, row.flags) == ("sparse-bf16", 2, "--enforce-eager")
    assert row.kv_tokens == 1048576 and row.tpot_ms
    assert 0 < row.ttft_engine_ms < row.ttft_mean_ms
    assert results.env["commit"] == "abc" and results.env["vllm"] != "none"
    served = (tmp_path / "logs" / "sparse-bf16" / "server.log").read_text()
    assert "stay packed" in served and '"reference"' in served
    assert "sparse-bf16" in (tmp_path / "out" / "serve-cpu.md").read_text()
