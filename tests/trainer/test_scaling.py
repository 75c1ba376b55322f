"""The scaling law: recovers what made the data, says how sure it is, and refuses the rest."""

import argparse
import ast
import csv
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from cast_serve.trainer import train
from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.data_source import DataSource
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.scaling.law import Law, Run, _Problem, bootstrap, fit, interval
from cast_serve.trainer.scaling.main import main
from cast_serve.trainer.scaling.predict import analyse, choose_target
from cast_serve.trainer.scaling.runs import read_runs

SIZE = 100_000_000
TRUE = Law(E=2.9, B=300.0, beta=0.33)
TRUE_2D = Law(E=1.8, B=500.0, beta=0.3, A=400.0, alpha=0.34)
BUDGETS = np.geomspace(1e7, 1e9, 8).astype(int)


def runs_of(
    law: Law, *, sizes: tuple[int, ...] = (SIZE,), noise: float = 0.0, seed: int = 0
) -> list[Run]:
    draw = np.random.default_rng(seed)
    return [
        Run(
            name=f"{size}-{tokens}",
            parameters=size,
            tokens=int(tokens),
            loss=law.loss(size, tokens) * math.exp(noise * draw.standard_normal()),
        )
        for size in sizes
        for tokens in BUDGETS
    ]


def constants(law: Law) -> tuple[float, ...]:
    return law.E, law.B, law.beta, law.A, law.alpha


def test_fit_recovers_the_law() -> None:
    assert constants(fit(runs_of(TRUE))) == pytest.approx(constants(TRUE), rel=0.01)


def test_fit_recovers_the_law_of_two_variables() -> None:
    runs = runs_of(TRUE_2D, sizes=(10**7, 10**8, 10**9))
    assert constants(fit(runs)) == pytest.approx(constants(TRUE_2D), rel=0.02)


def test_fit_with_noise_and_an_outlier() -> None:
    runs = runs_of(TRUE, noise=0.001)
    # A run that went wrong: least squares would move E by far more than the noise does.
    runs[3] = Run(name="bad", parameters=SIZE, tokens=runs[3].tokens, loss=runs[3].loss * 1.2)
    found = fit(runs)
    assert math.isclose(found.E, TRUE.E, rel_tol=0.02)
    assert found.beta == pytest.approx(TRUE.beta, rel=0.1)


def test_intervals_cover_the_truth() -> None:
    """Of 90 % intervals of 20 repetitions, about 18 hold what made the data."""
    target, needed = TRUE.loss(SIZE, 3e9), 3e9
    hits = {"E": 0, "beta": 0, "tokens": 0}
    for seed in range(20):
        runs = runs_of(TRUE, noise=0.003, seed=seed)
        laws = bootstrap(runs, fit(runs), resamples=25, seed=seed)
        for name, values, truth in (
            ("E", [law.E for law in laws], TRUE.E),
            ("beta", [law.beta for law in laws], TRUE.beta),
            ("tokens", [law.tokens_for(target, SIZE) for law in laws], needed),
        ):
            low, high = interval(values, 0.9)
            hits[name] += low <= truth <= high
    # Below 14 of 20 one count in 400 falls if 90 % is true; 20 in all three would be too wide.
    assert all(count >= 14 for count in hits.values()), hits
    assert min(hits.values()) < 20


def test_more_noise_wider_intervals() -> None:
    widths = []
    for noise in (0.0005, 0.01):
        runs = runs_of(TRUE, noise=noise)
        low, high = interval(
            [law.E for law in bootstrap(runs, fit(runs), resamples=40, seed=0)], 0.9
        )
        widths.append(high - low)
    assert 3 * widths[0] < widths[1]


def test_bootstrap_of_several_sizes_is_of_several_sizes() -> None:
    """Of most runs at one size many a draw has that one alone."""
    small = runs_of(TRUE_2D, sizes=(100_000_000,))[1:6]
    large = [runs_of(TRUE_2D, sizes=(size,))[3] for size in (400_000_000, 1_000_000_000)]
    runs = [*small, *large]
    laws = bootstrap(runs, fit(runs), resamples=20, seed=0)
    assert all(law.A > 0 and law.alpha > 0 for law in laws)


def test_bootstrap_follows_its_seed() -> None:
    runs = runs_of(TRUE, noise=0.002)
    law = fit(runs)
    first, again, other = (bootstrap(runs, law, resamples=5, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_interval_keeps_infinity() -> None:
    assert interval([1.0, 2.0, 3.0, math.inf], 0.9) == (1.0, math.inf)


@settings(max_examples=50, deadline=None)
@given(loss=st.floats(0.1, 10), beta=st.floats(0.05, 2), E=st.floats(0.1, 5), B=st.floats(0.1, 1e4))
def test_tokens_for_inverts_the_law(loss: float, beta: float, E: float, B: float) -> None:
    law = Law(E=E, B=B, beta=beta)
    tokens = law.tokens_for(loss, SIZE)
    if loss <= E:
        assert tokens == math.inf
    elif math.isfinite(tokens) and tokens > 0:
        assert law.loss(SIZE, tokens) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("sizes", [(SIZE,), (10**7, 10**8, 10**9)])
def test_gradient_of_the_fit(sizes: tuple[int, ...]) -> None:
    problem = _Problem.of(runs_of(TRUE_2D, sizes=sizes, noise=0.01))
    unknowns = np.array([0.5, -1.0, 0.4, -2.0, 0.2][: 3 if len(sizes) == 1 else 5])
    _, gradient = problem.objective(unknowns)
    for place in range(len(unknowns)):
        step = np.zeros_like(unknowns)
        step[place] = 1e-6
        up, down = (problem.objective(unknowns + sign * step)[0] for sign in (1, -1))
        assert gradient[place] == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-6)


def test_target_below_the_floor_is_not_reachable() -> None:
    runs = runs_of(TRUE, noise=0.0005)
    target = choose_target(runs, loss=2.5, gap=None, dense_loss=None, parameters=None)
    found = analyse(runs, target, confidence=0.9, resamples=20, seed=0).prediction
    assert found is not None
    assert found.tokens == math.inf and found.reachable_share == 0
    assert found.floor == pytest.approx(2.9, rel=0.02)


def test_gap_is_a_target_above_the_dense_loss() -> None:
    runs = runs_of(TRUE)
    target = choose_target(runs, loss=None, gap=0.05, dense_loss=3.0, parameters=None)
    assert target is not None and target.loss == pytest.approx(3.05)
    with pytest.raises(RunError, match=r"no run says the loss of the dense model.*--dense-loss"):
        choose_target(runs, loss=None, gap=0.05, dense_loss=None, parameters=None)


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        pytest.param(runs_of(TRUE)[:3], "3 runs cannot fit a law of 3 constants; give 4", id="few"),
        pytest.param(
            runs_of(TRUE_2D, sizes=(10**7, 10**8, 10**9))[::5], "5 runs cannot fit", id="few-2d"
        ),
        pytest.param([runs_of(TRUE)[0]] * 8, "1 different token budgets; give 3", id="one-budget"),
        pytest.param(
            runs_of(TRUE_2D, sizes=(10**7, 10**8)), "2 different sizes; give one, or 3", id="sizes"
        ),
    ],
)
def test_undetermined_is_refused(runs: list[Run], says: str) -> None:
    with pytest.raises(RunError, match=says):
        fit(runs)


def test_other_size_than_the_runs_is_refused() -> None:
    runs = runs_of(TRUE)
    target = choose_target(runs, loss=3.0, gap=None, dense_loss=None, parameters=7)
    with pytest.raises(RunError, match="parameters: all runs have 100000000"):
        analyse(runs, target, confidence=0.9, resamples=10, seed=0)


def test_warnings() -> None:
    few = analyse(runs_of(TRUE)[:5], None, confidence=0.9, resamples=10, seed=0)
    assert any("5 runs: intervals" in warning for warning in few.warnings)
    assert not any("the law" in warning for warning in few.warnings)
    flat = [
        Run(name="", parameters=SIZE, tokens=int(tokens), loss=3.0 + 0.001 * (place % 2))
        for place, tokens in enumerate(BUDGETS)
    ]
    said = analyse(flat, None, confidence=0.9, resamples=10, seed=0)
    assert said.law.loss(SIZE, 1e8) == pytest.approx(3.0, abs=0.002)
    power = analyse(
        runs_of(Law(E=1e-9, B=300.0, beta=0.3)), None, confidence=0.9, resamples=10, seed=0
    )
    assert any("no floor" in warning for warning in power.warnings)
    # Half of the runs on another curve.
    split = [*runs_of(TRUE)[::2], *runs_of(Law(E=2.4, B=300.0, beta=0.33))[1::2]]
    off = analyse(split, None, confidence=0.9, resamples=10, seed=0)
    assert off.residual > 0.03 and any("off the law" in warning for warning in off.warnings)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["parameters", "tokens", "loss", "dense_loss"])
        for run in runs_of(TRUE, noise=0.001):
            writer.writerow([run.parameters, run.tokens, run.loss, 3.1])
    return path


def test_command(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = [table, "--target-gap", "0.05", "-o", out, "--resamples", "30"]
    assert main([str(each) for each in arguments]) == 0
    printed = capsys.readouterr().out
    results = json.loads(printed.splitlines()[-1])
    assert results == json.loads((out / "results.json").read_text())
    assert (out / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    needed = TRUE.tokens_for(3.15, SIZE)
    low, high = results["target"]["tokens_interval"]
    assert low < results["target"]["tokens"] < high
    assert results["target"]["tokens"] == pytest.approx(needed, rel=0.5)
    assert "loss 3.1500 (+0.05 to the dense model) needs" in printed


@pytest.mark.parametrize("name", ["scipy", "matplotlib"])
def test_command_says_what_to_install(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # None in sys.modules is how Python marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        RunError, match=rf"needs {name}; install it: pip install 'cast-serve\[train"
    ):
        main([str(table), "-o", str(tmp_path / "out"), "--resamples", "10"])
    assert not (tmp_path / "out").exists()


def test_command_says_not_reachable(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [table, "--target-loss", "2", "-o", out, "--resamples", "10"]
    assert main([str(each) for each in arguments]) == 0
    printed = capsys.readouterr().out
    assert "loss 2.0000 is not reachable: the law stays above 2.9" in printed
    target = json.loads(printed.splitlines()[-1])["target"]
    assert target["reachable"] is False and target["tokens"] is None


def output_folder(path: Path, tokens: int, perplexity: float, dense: float = 20.0) -> Path:
    """What cast-train leaves of a run, as far as the law reads it."""
    path.mkdir()
    name = "model.layers.0.mlp.up_proj"
    tensors = {
        "model.embed_tokens.weight": torch.zeros(10, 16),
        "model.norm.weight": torch.ones(16),
        f"{name}.compressed": torch.zeros(32, 8),
        f"{name}.bitmask": torch.full((32, 2), 0x33, dtype=torch.uint8),
        f"{name}.shape": torch.tensor([[32], [16]]),
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    ours = {"quant_method": "cast", "format": "packed", "sparsity": "2:4", "version": 1}
    config = {"model_type": "llama", "num_hidden_layers": 1, "quantization_config": ours}
    config["tie_word_embeddings"] = True
    (path / "config.json").write_text(json.dumps(config))
    evaluation = {"perplexity_after_prune": perplexity, "perplexity_dense": dense}
    record = {"tokens": tokens, "evaluation": evaluation}
    (path / "cast.json").write_text(json.dumps(record))
    return path


def test_read_runs_of_output_folders(tmp_path: Path) -> None:
    (run,) = read_runs([output_folder(tmp_path / "a", 1000, 30.0)])
    # Pruned weights are parameters too: 10 x 16 + 16 + 32 x 16.
    assert run == Run(
        name="a", parameters=688, tokens=1000, loss=math.log(30), dense_loss=math.log(20)
    )


def test_runs_evaluated_on_other_text_are_refused(tmp_path: Path) -> None:
    folders = [
        output_folder(tmp_path / "a", 1000, 30.0),
        output_folder(tmp_path / "b", 2000, 28.0, dense=21.0),
    ]
    with pytest.raises(RunError, match=r"a and b: their dense models' losses are 2\.9957"):
        read_runs(folders)


def spoil(edit: Callable[[dict], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        record = json.loads((folder / "cast.json").read_text())
        edit(record)
        (folder / "cast.json").write_text(json.dumps(record))

    return apply


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "cast.json").unlink(), "holds no cast.json; give the OUTPUT folder"),
        (lambda f: (f / "cast.json").write_text("{"), "cast.json: is not JSON"),
        (spoil(lambda r: r.pop("tokens")), "cast.json: has no 'tokens'"),
        (spoil(lambda r: r.pop("evaluation")), "cast.json: has no 'evaluation'"),
        (spoil(lambda r: r.update(tokens=-1)), "tokens: expected a whole number above 0, got -1"),
        (
            spoil(lambda r: r["evaluation"].update(perplexity_after_prune=math.inf)),
            "perplexity_after_prune: expected a finite number above 0",
        ),
    ],
)
def test_damaged_output_is_named(
    tmp_path: Path, damage: Callable[[Path], object], says: str
) -> None:
    folder = output_folder(tmp_path / "a", 1000, 30.0)
    damage(folder)
    with pytest.raises(RunError, match=says):
        read_runs([folder])


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.csv", "parameters,tokens\n1,2\n", "row 1: has no loss"),
        ("t.csv", "parameters,tokens,loss\n1,2,x\n", "row 1: loss: expected a finite number"),
        ("t.csv", "parameters,tokens,loss\n1.5,2,3\n", "row 1: parameters: expected a whole"),
        ("t.csv", "parameters,tokens,loss\n", "holds no rows"),
        ("t.json", "{}", "holds no rows"),
        ("t.json", "[1]", "row 1: has no parameters"),
    ],
)
def test_damaged_table_is_named(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match=says):
        read_runs([tmp_path / name])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--confidence", "1"], "confidence: 1.0 is not between 0 and 1"),
        (["--resamples", "0"], "resamples: 0 is out of range"),
        (["--target-loss", "nan"], "target_loss: nan is out of range"),
        (["--dense-loss", "3"], "dense_loss: is only used with --target-gap"),
        (["--target-loss", "1", "--target-gap", "1"], "not allowed with"),
    ],
)
def test_bad_flags(table: Path, tmp_path: Path, flags: list[str], says: str) -> None:
    with pytest.raises(RunError, match=says):
        main([str(table), "-o", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_law_of_six_real_runs(
    make_config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """cast-train six times and once more: the law of the first six foretells the seventh."""
    text = tmp_path / "sources.txt"
    # Enough text of many kinds that no run reads any of it twice.
    text.write_text(
        "\n\n\n".join(inspect.getsource(m) for m in (argparse, ast, csv, inspect, json))
    )
    folders = []
    for steps in (60, 100, 160, 250, 400, 600, 900):
        config = make_config(
            data=(DataSource(place=str(text)),),
            output=tmp_path / str(steps),
            steps=steps,
            # A random teacher has nothing to teach.
            eta=0.0,
            lambda_=1e-3,
            export="packed",
            allow_short_travel=True,
        )
        train.run(config, Console(quiet=True))
        folders.append(str(config.output))
    capsys.readouterr()
    assert main([*folders[:6], "-o", str(tmp_path / "law"), "--resamples", "50"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    longest = read_runs([Path(folders[6])])[0]
    law = Law(**results["constants"])
    assert longest.parameters == sum(p.numel() for p in tiny_parameters(make_config()))
    assert law.loss(longest.parameters, longest.tokens) == pytest.approx(longest.loss, rel=0.1)
    assert results["residual"] < 0.05


def tiny_parameters(config: RunConfig) -> Iterable[torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(config.model).parameters()
