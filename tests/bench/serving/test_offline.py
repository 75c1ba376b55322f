"""vllm bench latency and throughput: what is asked for, and what is read."""

import json
from pathlib import Path

import pytest

from cast_serve.bench import bench_latency, bench_load, bench_serve, bench_throughput
from cast_serve.bench.arguments import numbers
from cast_serve.bench.serving.arguments import refuse_forced_kernel, split_flags
from cast_serve.bench.serving.engines import find_engines
from cast_serve.bench.serving.offline import Job
from cast_serve.bench.serving.offline_results import Row, beside, lines, load_or_empty, speedup


def make_row(engine: str, seconds: float, flags: str = "") -> Row:
    return Row(
        engine=engine,
        model="tiny",
        requests=4,
        input_len=64,
        output_len=32,
        iterations=3,
        seconds=seconds,
        spread_s=0.1,
        output_tokens_per_s=128 / seconds,
        weights_gib=None,
        kv_tokens=1048576,
        flags=flags,
        run="one",
    )


def test_seconds() -> None:
    """The files' keys as vLLM 0.26 and 0.32 write them."""
    options = {"requests": 4, "input_len": 64, "output_len": 32, "flags": ()}
    latency = {"avg_latency": 0.07, "latencies": [0.068, 0.07], "percentiles": {"50": 0.07}}
    assert Job(benchmark="latency", **options).seconds(latency) == [0.068, 0.07]
    throughput = {"elapsed_time": 0.5, "num_requests": 4, "tokens_per_second": 768.0}
    assert Job(benchmark="throughput", **options).seconds(throughput) == [0.5]


def test_speedup() -> None:
    dense, sparse = make_row("dense-bf16", 1.0), make_row("sparse-bf16", 0.8)
    assert speedup(sparse, [dense, sparse]) == 1.25
    assert speedup(dense, [dense, sparse]) is None
    assert speedup(make_row("sparse-bf16", 0.8, "--enforce-eager"), [dense]) is None


def test_results(tmp_path: Path) -> None:
    path = tmp_path / "latency-cpu.json"
    results = load_or_empty(path).merge({"run": "one"}, [make_row("dense-bf16", 1.0)])
    results.save(path)
    assert load_or_empty(path) == results
    assert json.loads(path.read_text())["rows"][0]["seconds"] == 1.0


def test_report(tmp_path: Path) -> None:
    env = {"run": "one", "driver": "580", "torch": "2.11", "vllm": "0.26"}
    rows = [make_row("sparse-bf16", 0.8), make_row("dense-bf16", 1.0)]
    rows.append(make_row("sparse-bf16", 0.9, "--enforce-eager"))
    serve = tmp_path / "serve-h200.json"
    assert beside(serve) == {}
    load_or_empty(tmp_path / "latency-h200.json").merge(env, rows).save(
        tmp_path / "latency-h200.json"
    )
    assert beside(serve) == {"latency": tmp_path / "latency-h200.json"}
    found = lines(tmp_path / "latency-h200.json")
    assert "| 4 | 64 | 32 | dense-bf16 | 1.000 ± 0.100 | 128 | - | 1,048,576 |" in found
    assert "| 4 | 64 | 32 | sparse-bf16 | 0.800 ± 0.100 | 160 (1.25) | - | 1,048,576 |" in found
    assert "tiny, `--enforce-eager`:" in found
    assert found[-1] == "Runs: one: driver 580, torch 2.11, vLLM 0.26."


def test_counts() -> None:
    assert numbers("--requests", "1,64") == [1, 64]
    with pytest.raises(ValueError, match="--requests 1,: needs numbers from 1 on"):
        numbers("--requests", "1,")


@pytest.mark.parametrize("program", [bench_latency, bench_throughput])
def test_refuses(program, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--requests", "0"]) == 2
    assert "--requests 0: needs numbers from 1 on" in capsys.readouterr().err
    assert program.main(["--engines", "sparse-int8"]) == 2
    assert "no engine 'sparse-int8'; there is dense-bf16, " in capsys.readouterr().err
    assert program.main(["--output-len", "0"]) == 2
    assert "--output-len 0: needs 1 or more" in capsys.readouterr().err
    assert program.main(["--model", "tiny", "--input-len", "1000000"]) == 2
    assert "tiny is served with" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--out", "--logs"])
@pytest.mark.parametrize("program", [bench_latency, bench_load, bench_serve])
def test_folders_that_cannot_be_written_to(program, flag, tmp_path: Path, capsys) -> None:
    """Known before an engine is started, not when there is something to write."""
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        program.main(["--model", "tiny", flag, str(tmp_path / "file" / "results")])
    assert f"{flag}: {tmp_path / 'file'} is no folder" in capsys.readouterr().err


def test_iterations(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_latency.main(["--iterations", "0"]) == 2
    assert "--iterations 0: needs 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("program", [bench_latency, bench_throughput, bench_load])
def test_result_file_of_another_version(program, tmp_path: Path, capsys) -> None:
    name = program.__name__.rpartition("_")[2]
    for path in (tmp_path / f"{name}-{gpu}.json" for gpu in ("cpu", "nvidia")):
        path.write_text('{"env": {}, "runs": {}, "rows": [{"engine": "dense-bf16"}]}')
    assert program.main(["--model", "tiny", "--out", str(tmp_path)]) == 2
    assert "row 0 lacks, or should not have: " in capsys.readouterr().err


def test_fp8_is_for_gpus() -> None:
    names = "dense-bf16,dense-fp8"
    engines, out = find_engines(names, on_gpu=False)
    assert [engine.name for engine in engines] == ["dense-bf16"]
    assert out == {"dense-fp8": "vLLM quantizes to FP8 on GPUs only"}
    engines, out = find_engines(names, on_gpu=True)
    assert engines[1].flags == ("--quantization", "fp8") and not out


def test_forced_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAST_SERVE_KERNEL", "reference")
    refuse_forced_kernel(on_gpu=False)
    with pytest.raises(ValueError, match="CAST_SERVE_KERNEL=reference is set and would be"):
        refuse_forced_kernel(on_gpu=True)


def test_split_flags() -> None:
    assert split_flags(["--out", "d", "--", "-O0", "--", "x"]) == (
        ["--out", "d"],
        ("-O0", "--", "x"),
    )
    assert split_flags(["--out", "d"]) == (["--out", "d"], ())
