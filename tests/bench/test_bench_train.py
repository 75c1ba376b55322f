"""bench_train on a CPU: it runs, and what it writes can be read."""

import json

import pytest

from cast_serve.bench.bench_train import (
    CAST,
    PLAIN,
    Row,
    by_method,
    estimate_gib,
    fault,
    llama_config,
    main,
    run_config,
)
from cast_serve.bench.decoders import DECODERS
from cast_serve.bench.paths import RESULTS
from cast_serve.bench.result_file import read
from cast_serve.trainer.capacity import Shape, empty_model

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


@pytest.mark.parametrize("file", sorted(RESULTS.glob("train-*.json")), ids=lambda file: file.stem)
def test_memory_is_estimated_as_it_was_measured(file):
    decoders = {decoder.name: decoder for decoder in DECODERS}
    for row in read(file, Row, fault).rows:
        config = by_method(
            run_config(batch_size=row.batch_size, context=row.context), method=row.method
        )
        model = empty_model(llama_config(decoders[row.model], row.context))
        estimate = estimate_gib(Shape.of(model, config), config)
        assert estimate == pytest.approx(row.estimated_gib, rel=1e-3), "written by older code"
        assert estimate == pytest.approx(row.peak_gib, rel=0.05)
