import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from vllm.config import ProfilerConfig

from cast_serve.bench.result_file import ResultError
from cast_serve.bench.serving.breakdown import (
    Row,
    beside,
    load_or_empty,
    print_rows,
    profiler_flags,
)


def make_row(engine: str, linear: float, steps: int = 254) -> Row:
    return Row(
        engine=engine,
        model="Llama-3.1-8B",
        workload="c1",
        steps=steps,
        step_ms=linear + 1,
        parts_ms={"2:4 linear": linear, "GPU idle": 1.0},
        flags="",
        run="one",
    )


def test_profiler_flags(tmp_path: Path) -> None:
    """vLLM takes them."""
    flag, value = profiler_flags(tmp_path)
    config = ProfilerConfig(**json.loads(value))
    assert flag == "--profiler-config"
    assert config.profiler == "torch" and config.torch_profiler_dir == str(tmp_path)


def test_print_rows() -> None:
    console = Console(file=io.StringIO(), width=100)
    print_rows([make_row("dense-bf16", 0.0), make_row("sparse-bf16", 2.5)], "on a GPU", console)
    lines = [line.replace("│", " ").split() for line in console.file.getvalue().splitlines()]
    assert ["2:4", "linear", "0.000", "2.500"] in lines
    assert ["step", "1.000", "3.500"] in lines


def test_load(tmp_path: Path) -> None:
    path = beside(tmp_path / "serve-h200.json")
    assert path.name == "breakdown-h200.json"
    results = load_or_empty(path).merge({"run": "one"}, [make_row("dense-bf16", 2.5)])
    results.save(path)
    assert load_or_empty(path) == results
    results.merge({"run": "one"}, [make_row("dense-bf16", 2.5, steps=0)]).save(path)
    with pytest.raises(ResultError, match="row 0: steps and times must be above zero"):
        load_or_empty(path)
