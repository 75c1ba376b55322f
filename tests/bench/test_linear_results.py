import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cast_serve.bench.linear_results import (
    Results,
    Row,
    load,
    load_or_empty,
    sparse_bytes,
    totals,
)
from cast_serve.bench.result_file import ResultError


def test_save_load_roundtrip(result_file: Path, results: Results) -> None:
    assert load(result_file) == results
    assert not list(result_file.parent.glob("*.part"))


def test_load_or_empty(tmp_path: Path) -> None:
    assert load_or_empty(tmp_path / "none.json") == Results()


def test_file_has_env_and_rows(result_file: Path) -> None:
    content = json.loads(result_file.read_text())
    assert content["env"]["gpu"] == "NVIDIA H200"
    promised = {"model", "layer", "N", "K", "M", "dtype", "dense_us", "sparse_us", "kernel"}
    promised |= {"gbps", "copy_gbps"}
    assert all(promised <= row.keys() for row in content["rows"])


def test_merge_replaces_same_key(results: Results, env, row: Callable[..., Row]) -> None:
    again = row(M=1, kernel="wgmma_sp", run="two")
    merged = results.merge(env("two"), [again])
    assert len(merged.rows) == len(results.rows)
    assert [r for r in merged.rows if r.run == "two"] == [again]
    assert merged.env["run"] == "two" and merged.runs.keys() == {"one", "two"}


def test_merge_keeps_forced_beside_selected(results: Results, env, row: Callable[..., Row]) -> None:
    forced = row(M=1, kernel="wgmma_sp", selected=False)
    assert len(results.merge(env("one"), [forced]).rows) == len(results.rows) + 1


def test_merge_forgets_runs_without_rows(env, row: Callable[..., Row]) -> None:
    first = Results().merge(env("one"), [row()])
    assert first.merge(env("two"), [row(run="two")]).runs.keys() == {"two"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [{"model": "m"}]}, "row 0 lacks, or should not have: K, M, N"),
        ({"rows": None}, "not an object with env, runs and rows"),
        ({"runs": {}}, "rows of runs that are not in it: one"),
    ],
    ids=["row", "rows", "runs"],
)
def test_load_refuses(result_file: Path, change: dict[str, object], message: str) -> None:
    content = json.loads(result_file.read_text()) | change
    if content["rows"] is None:
        del content["rows"]
    result_file.write_text(json.dumps(content))
    with pytest.raises(ResultError, match=message):
        load(result_file)


def test_load_refuses_times(result_file: Path) -> None:
    content = json.loads(result_file.read_text())
    content["rows"][3]["sparse_us"] = 0
    result_file.write_text(json.dumps(content))
    with pytest.raises(ResultError, match="row 3: times and rates must be numbers above zero"):
        load(result_file)


def test_load_refuses_text(tmp_path: Path) -> None:
    path = tmp_path / "linear-h200.json"
    path.write_text("speed")
    with pytest.raises(ResultError, match=r"linear-h200.json: not JSON"):
        load(path)


def test_sparse_bytes() -> None:
    # 36 bits a group of four: 9/16 of the dense weight's 2 bytes; x and y once.
    assert sparse_bytes(N=4096, K=4096, M=0) == 4096 * 4096 * 2 * 9 / 16
    assert sparse_bytes(N=64, K=128, M=3) == 64 * 128 * 9 / 8 + 2 * 3 * (64 + 128)
    # FP8: half of 0.625.
    assert sparse_bytes(N=64, K=128, M=0, itemsize=1) == 64 * 128 * 0.625


def test_row_roof_by_bytes(row: Callable[..., Row]) -> None:
    decode = row(M=1)
    assert decode.roof_us == pytest.approx(sparse_bytes(N=6144, K=4096, M=1) / 4000e9 * 1e6)
    assert decode.roof_share == pytest.approx(0.8) == decode.copy_share


def test_row_roof_by_arithmetic(row: Callable[..., Row]) -> None:
    prefill = row(M=16384)
    assert prefill.roof_us == pytest.approx(2 * 16384 * 6144 * 4096 / 1600e12 * 1e6)
    assert prefill.tflops == pytest.approx(0.8 * 1600)


def test_totals(row: Callable[..., Row]) -> None:
    rows = [
        row(layer=layer, dense_us=dense, sparse_us=sparse)
        for layer, dense, sparse in (("qkv", 2, 1), ("o", 1, 1), ("gate_up", 6, 3), ("down", 3, 3))
    ]
    (total,) = totals(rows)
    assert (total.M, total.dense_us, total.sparse_us) == (16, 12, 8)
    assert (total.speedup, total.least_speedup) == (1.5, 1)


def test_totals_needs_every_layer(row: Callable[..., Row]) -> None:
    assert totals([row(), replace(row(), layer="o")]) == []
