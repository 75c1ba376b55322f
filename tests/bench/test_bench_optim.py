"""bench_optim on a CPU: it runs, and what it writes can be read and joined."""

import json
from pathlib import Path

import pytest

from cast_serve.bench.bench_optim import MASK_INTERVAL, Row, fault, main
from cast_serve.bench.result_file import read


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_writes_rows_that_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The small model: on a GPU the default ones would run.
    arguments = ["--models", "small", "--repeats", "2", "--out", str(tmp_path)]
    for _ in range(2):
        summary = run(arguments, capsys)
    (file,) = tmp_path.iterdir()
    assert summary["files"] == [str(file)]
    results = read(file, Row, fault)
    names = [row.optimizer for row in results.rows]
    assert len(names) == len(set(names)) and {"AdamW fused", "AdamS reference"} <= set(names)
    assert {row.run for row in results.rows} == {results.env["run"]}
    for row in results.rows:
        spread = row.step_us + (row.refresh_us - row.step_us) / MASK_INTERVAL
        assert row.mean_us == pytest.approx(spread)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--models", "gpt-5"], "no model 'gpt-5'"), (["--repeats", "1"], "needs 2 or more")],
)
def test_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
