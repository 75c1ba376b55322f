"""bench_train on a CPU: it runs, and what it writes can be read."""

import json

import pytest

from cast_serve.bench.bench_train import CAST, PLAIN, Row, fault, main
from cast_serve.bench.result_file import read

SMALL = ["--models", "small", "--batch-size", "2", "--context", "16", "--steps", "2"]


def test_writes_rows_that_can_be_read(tmp_path, capsys):
    assert main([*SMALL, "--no-compile", "--out", str(tmp_path)]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    (file,) = tmp_path.iterdir()
    assert summary["files"] == [str(file)]
    rows = {row.method: row for row in read(file, Row, fault).rows}
    assert set(rows) == {PLAIN, CAST}
    assert rows[PLAIN].teacher_ms == 0 < rows[CAST].teacher_ms
    ratio = rows[CAST].step_ms / rows[PLAIN].step_ms
    assert summary["ratios"] == {"small": pytest.approx(ratio)}


def test_refuses(capsys):
    assert main(["--models", "gpt-5"]) == 2
    assert "no model 'gpt-5'" in capsys.readouterr().err
