import json
from dataclasses import replace
from pathlib import Path

import pytest

from cast_serve.bench.result_file import ResultError
from cast_serve.bench.serving.floors import FLOORS, judge
from cast_serve.bench.serving.report import cells, summarize
from cast_serve.bench.serving.results import Ratios, Results, baseline_of, load, load_or_empty
from cast_serve.bench.serving.setting import Setting


def test_save_load_roundtrip(result_file: Path, results: Results) -> None:
    assert load(result_file) == results
    assert load_or_empty(result_file.with_name("none.json")) == Results()


def test_file_has_what_was_promised(result_file: Path) -> None:
    content = json.loads(result_file.read_text())
    assert {"gpu", "driver", "torch", "vllm", "commit"} <= content["env"].keys()
    promised = {"engine", "model", "workload", "concurrency", "ttft_ms", "tpot_ms"}
    promised |= {"output_tokens_per_s", "weights_gib", "kv_tokens"}
    assert all(promised <= row.keys() for row in content["rows"])


def test_row_is_median_and_spread(row) -> None:
    repeated = row(scales=(1.2, 1.0, 1.1))
    assert repeated.repeats == 3
    assert (repeated.ttft_ms, repeated.tpot_ms) == pytest.approx((22, 5.5))
    assert repeated.ttft_p99_ms == pytest.approx(44)
    assert repeated.tpot_spread_ms == pytest.approx(1.0)
    assert repeated.output_tokens_per_s == pytest.approx(1000 / 1.1)
    assert repeated.output_tokens_per_s_spread == pytest.approx(1000 - 1000 / 1.2)
    once, thrice = (cells(one, [], "NVIDIA H200")[2] for one in (row(), repeated))
    assert (once, thrice) == ("20.0", "22.0 ± 4.0")


def test_prefill_row_has_no_tpot(row) -> None:
    prefill = row(workload="prefill-2048")
    assert prefill.tpot_ms is None and prefill.tpot_spread_ms is None


def test_merge_replaces_one_workload_of_one_engine(results: Results, env, row) -> None:
    again = row("sparse-bf16", "c16", (0.5,), run="two")
    merged = results.merge(env("two"), [again])
    assert len(merged.rows) == len(results.rows)
    assert [r for r in merged.rows if r.run == "two"] == [again]
    other_flags = row("sparse-bf16", "c16", run="three", flags=("--enforce-eager",))
    assert len(merged.merge(env("three"), [other_flags]).rows) == len(results.rows) + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ttft_ms": 0}, "row 0: times, rates and sizes must be numbers above zero"),
        ({"tpot_ms": -1.0}, "row 0: times, rates and sizes must be numbers above zero"),
        ({"run": "two"}, "rows of runs that are not in it: two"),
        ({"speed": 1}, "row 0 lacks, or should not have: speed"),
    ],
)
def test_load_refuses(result_file: Path, change: dict[str, object], message: str) -> None:
    content = json.loads(result_file.read_text())
    content["rows"][0] |= change
    result_file.write_text(json.dumps(content))
    with pytest.raises(ResultError, match=message):
        load(result_file)


def test_ratios(row) -> None:
    dense, sparse = row("dense-bf16"), row("sparse-bf16", scales=(0.8,))
    faster = {"ttft": 1.25, "tpot": 1.25, "output_tokens_per_s": 1.25}
    smaller = {"weights_gib": 14.99 / 9.34}
    assert vars(Ratios.of(sparse, dense)) == pytest.approx(faster | smaller)
    on_cpu = replace(sparse, weights_gib=None)
    assert Ratios.of(on_cpu, dense).weights_gib is None


def test_ratios_need_the_same_flags(row) -> None:
    dense = row("dense-bf16", flags=("--enforce-eager",))
    assert baseline_of(row("sparse-bf16"), [dense]) is None
    assert Ratios.of(row("sparse-bf16"), None) == Ratios(None, None, None, None)


def test_ratios_need_the_same_requests(row) -> None:
    """A workload may have had other lengths when the baseline was measured."""
    dense = replace(row("dense-bf16"), input_len=1024)
    assert baseline_of(row("sparse-bf16"), [dense]) is None


@pytest.mark.parametrize("name", ["driver", "vllm", "cpu"])
def test_rows_of_other_versions_are_not_gone_on_from(
    result_file: Path, results: Results, env, tmp_path: Path, capsys, name: str
) -> None:
    """What they would be divided by is not what the engine gained."""
    here = Setting(env=env("two"), engines=(), left_out={}, logs=tmp_path)
    assert here.earlier(result_file, load_or_empty) == results
    assert capsys.readouterr().err == ""
    updated = replace(here, env=env("two") | {name: "another"})
    assert updated.earlier(result_file, load_or_empty).rows == ()
    assert f"{len(results.rows)} rows of {result_file} are of" in capsys.readouterr().err


def test_floors(results: Results) -> None:
    """4/3 everywhere: enough for the last three."""
    judged = judge(results.rows, "NVIDIA H200")
    assert {one.floor for one in judged} == set(FLOORS)
    assert {one.floor.workload for one in judged if not one.met} == {"c1", "c16"}
    missed = summarize({"gpu": "NVIDIA H200", "vllm": "", "commit": ""}, results.rows, {})
    assert missed["below_floor"] == [
        "tpot of c1: 1.333 < 1.400",
        "weights_gib of c1: 1.605 < 1.613",
        "tpot of c16: 1.333 < 1.350",
    ]


def test_floor_is_met_by_equality(row) -> None:
    rows = [row("dense-bf16", "c64", (1.25,)), row("sparse-bf16", "c64", (1.0,))]
    (judged,) = judge(rows, "NVIDIA H100 80GB HBM3")
    assert judged.met


def test_floors_are_for_one_model_and_gpu(results: Results, row) -> None:
    assert judge(results.rows, "NVIDIA L4") == []
    small = [row(engine, model="Llama-3.2-1B") for engine in ("dense-bf16", "sparse-bf16")]
    assert judge(small, "NVIDIA H200") == []
    eager = [row(engine, flags=("--enforce-eager",)) for engine in ("dense-bf16", "sparse-bf16")]
    assert judge(eager, "NVIDIA H200") == []
