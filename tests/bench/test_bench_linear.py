import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cast_serve.bench import report
from cast_serve.bench.accuracy import Error, Judge, WrongResult
from cast_serve.bench.bench_linear import main, parse
from cast_serve.bench.environment import slug
from cast_serve.bench.linear_results import Results, Row
from cast_serve.bench.make_table import add_plan, find_table, write_table
from cast_serve.bench.points import Forced
from cast_serve.bench.shapes import MODELS, TOKENS, Layer
from cast_serve.bench.weights import random_packed
from cast_serve.kernels.packing import check_mask
from cast_serve.kernels.plan import Plan
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.registry import KERNELS


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("program", ["bench_linear", "make_table"])
def test_without_gpu(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib

    status = importlib.import_module(f"cast_serve.bench.{program}").main([])
    assert status == 2
    assert f"{program}: needs an NVIDIA GPU, and torch" in capsys.readouterr().err


def test_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--models", "gpt-5"]) == 2
    assert "no model 'gpt-5'" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", ["0", "1,-8", "1,,8", "many"])
def test_bad_tokens(tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tokens", tokens]) == 2
    assert f"--tokens {tokens}: needs numbers from 1 on" in capsys.readouterr().err


def test_parse() -> None:
    options = parse(["--models", "llama-3.1-8b", "--kernel", "wgmma_sp:g2x1", "--dtype", "float16"])
    assert [model.name for model in options.models] == ["Llama-3.1-8B"]
    assert options.tokens == TOKENS and options.dtype is torch.float16
    assert options.forced == (Forced("wgmma_sp", "g2x1"),)


def test_parse_all_kernels() -> None:
    options = parse(["--all-kernels", "--tokens", "1,64"])
    assert [force.kernel for force in options.forced] == list(KERNELS)
    assert options.tokens == (1, 64)


def test_forced_refuses() -> None:
    with pytest.raises(ValueError, match="no kernel 'magic'; there is mma_sp"):
        Forced.parse("magic")


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3")],
)
def test_slug(gpu: str, expected: str) -> None:
    assert slug(gpu) == expected


def test_random_packed() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Layer("o", 64, 256)
    values, mask = random_packed(layer, dtype=torch.float16, generator=generator)
    assert values.shape == (64, 128) and mask.shape == (64, 32)
    assert check_mask(mask).ok and len(mask.unique()) == 36
    assert values.float().std().item() == pytest.approx(128**-0.5, rel=0.1)


def test_judge() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 256, generator=generator).bfloat16()
    weight = torch.randn(64, 256, generator=generator).bfloat16()
    judge = Judge.of(x, weight)
    y = torch.nn.functional.linear(x, weight)
    judge.check("torch", lambda: y)
    wrong = y.clone()
    wrong[32, 63] += y.abs().max()
    with pytest.raises(WrongResult, match="broken is wrong at M=33 N=64: error"):
        judge.check("broken", lambda: wrong)
    with pytest.raises(WrongResult):
        judge.check("unwritten", lambda: torch.full_like(y, float("nan")))


def test_error_allows_twice() -> None:
    assert Error(1e-3, 1e-2).allows(Error(2e-3, 2e-2))
    assert not Error(1e-3, 1e-2).allows(Error(2.1e-3, 1e-2))
    assert not Error(1e-3, 1e-2).allows(Error(1e-3, 2.1e-2))


def test_summarize(results: Results, env, row: Callable[..., Row]) -> None:
    slow = row(layer="o", N=4096, M=1, dense_us=4.0, sparse_us=5.0)
    rows = [r for r in results.rows if r.key != slow.key] + [slow]
    summary = json.loads(json.dumps(report.summarize(env("one"), MODELS[:1], rows)))
    assert summary["speedup"]["Llama-3.1-8B"]["256"] == 1.25
    assert "Llama-3.1-8B M=16: 1.25 < 1.60" in summary["below_floor"]
    assert summary["slower_than_dense"] == ["Llama-3.1-8B o M=1: 0.80"]
    assert "Llama-3.1-8B gate_up M=16: 80%" in summary["below_copy_share"]
    assert summary["largest_resident"] == 0.5625


def test_print_model(results: Results) -> None:
    console = Console(file=io.StringIO(), width=150)
    model = MODELS[0]
    report.print_model(model, [r for r in results.rows if r.model == model.name], console)
    printed = console.file.getvalue()
    assert "MISS" in printed and "pass" in printed and "cusparselt" in printed


def test_table_file(tmp_path: Path) -> None:
    """Written, found again by the GPU's name, and a second plan of a shape takes its place."""
    problem = Problem(N=64, K=128, dtype=torch.float16, capability=(9, 0), gpu="NVIDIA L4")
    path, table = find_table(tmp_path, problem.gpu)
    assert path.name == "l4.json" and table == {"gpu": "NVIDIA L4", "plans": []}
    for config in ("first", "second"):
        plan = Plan.of({1: ("mma_sp", config)})
        add_plan(table, problem, plan)
        write_table(path, table)
    assert find_table(tmp_path, "NVIDIA L4") == (path, table)
    assert table["plans"] == [{"N": 64, "K": 128, "dtype": "float16", "plan": plan.to_json()}]
    assert find_table(tmp_path, "NVIDIA A100-SXM4-80GB")[0].name == "a100-sxm4-80gb.json"
