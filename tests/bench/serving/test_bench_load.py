"""bench_load: what it refuses, and what it compares."""

from dataclasses import replace
from pathlib import Path

import pytest

from cast_serve.bench import bench_load
from cast_serve.bench.bench_load import checkpoint, main
from cast_serve.bench.serving.engines import ENGINES
from cast_serve.bench.serving.loading_results import Row, lines, load_or_empty, of_dense
from cast_serve.bench.serving.models import find_served_model

DENSE = Row(
    engine="dense-bf16",
    model="Llama-3.1-8B",
    repeats=3,
    load_s=4.0,
    spread_s=0.1,
    start_s=20.0,
    weights_gib=15.0,
    kv_tokens=400000,
    host_gib=17.0,
    checkpoint_gib=15.0,
    flags="",
    run="one",
)


def test_of_dense() -> None:
    packed = replace(DENSE, engine="sparse-bf16", load_s=3.0, weights_gib=9.3, kv_tokens=440000)
    assert of_dense(packed, DENSE) == {
        "load_s": 0.75,
        "kv_tokens": 1.1,
        "host_gib": 1.0,
        "checkpoint_gib": 1.0,
        "weights_gib": 0.62,
    }
    on_cpu = replace(packed, weights_gib=None)
    assert "weights_gib" not in of_dense(on_cpu, DENSE)


def test_lines(tmp_path: Path, env) -> None:
    packed = replace(DENSE, engine="sparse-bf16", load_s=3.0, weights_gib=9.3, kv_tokens=440000)
    file = tmp_path / "load-h200.json"
    rows = [replace(row, run=env()["run"]) for row in (DENSE, packed)]
    load_or_empty(file).merge(env(), rows).save(file)
    found = lines(file)
    assert found[0] == "Llama-3.1-8B:"
    assert "| dense-bf16 | 4.00 ± 0.10 | 20 | 15.00 | 400,000 | 17.00 | 15.00 |" in found
    shown = "| sparse-bf16 | 3.00 ± 0.10 (0.750) | 20 | 9.30 (0.620) | 440,000 (1.100) "
    assert f"{shown}| 17.00 (1.000) | 15.00 (1.000) |" in found
    assert found[-1].startswith(f"Runs: {env()['run']}: driver ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats 0: needs 1 or more"),
        (["--model", "llama"], "no model 'llama'"),
        (["--engines", "sparse"], "no engine 'sparse'"),
    ],
)
def test_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"bench_load: {message}")


def test_checkpoint_that_was_not_written_whole(tmp_path: Path, monkeypatch) -> None:
    """Else every later run starts engines on what there is of it."""
    engine, model = ENGINES[0], find_served_model("tiny")

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(bench_load, "write_weights", interrupt)
        checkpoint(engine, model, tmp_path)
    assert not list(tmp_path.iterdir())
    assert (checkpoint(engine, model, tmp_path) / "model.safetensors").exists()
