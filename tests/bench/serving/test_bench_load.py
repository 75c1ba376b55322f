"""bench_load: what it refuses, and what it compares."""

from dataclasses import replace

import pytest

from cast_serve.bench.bench_load import Row, main, of_dense

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
