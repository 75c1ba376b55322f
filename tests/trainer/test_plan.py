"""The plan: counts, the travel check on the actual schedule and weights, and the dry run."""

import io
import math

import pytest
import torch
from rich.console import Console

from cast_serve.kernels.pattern import nm_mask
from cast_serve.trainer.config import HIGHEST_DEFAULT_LR
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.layers import choose_layers
from cast_serve.trainer.main import main
from cast_serve.trainer.plan import check_travel, make_plan, step_count
from cast_serve.trainer.report import render_plan


@pytest.fixture
def plan_of(make_config, tiny_models):
    """Plan of the tiny Llama on 100 blocks under a configuration with changes."""

    def make(model_name="llama", change_model=lambda model: None, **changes):
        config = make_config(**changes)
        model = tiny_models[model_name]()
        change_model(model)
        layers = choose_layers(model, config.nm, scaling_blocks=2)
        return make_plan(
            config,
            model,
            layers,
            context=32,
            train_blocks=100,
            eval_blocks=2,
            evaluated_on="held-out",
            lambda_=config.lambda_,
        )

    return make


def lr_for(plan_of, travel, steps):
    """The rate that travels `travel` times in `steps`: travel is linear in the rate."""
    return travel / plan_of(steps=steps, lr=1.0).travel


def test_travel_is_the_sum_of_the_schedule(plan_of, tiny_models):
    steps, lr = 40, 2e-3
    plan = plan_of(steps=steps, lr=lr)
    total = 0.0
    for t in range(1, steps + 1):
        rate = t / 2 if t <= 2 else 0.1 + 0.45 * (1 + math.cos(math.pi * (t - 2) / 38))
        total += lr * rate * t / steps
    smaller_halves = []
    for name, weight in tiny_models["llama"]().named_parameters():
        if name.endswith("_proj.weight"):
            smaller_halves.append(weight.detach().abs().reshape(-1, 4).sort(1).values[:, :2])
    masked = torch.cat(smaller_halves).double().mean().item()
    assert plan.travel == pytest.approx(total / masked, rel=1e-6)


def test_travel_grows_with_a_shorter_ramp(plan_of):
    # A decay at full strength from half of the run on carries weights further at the same rate.
    assert plan_of(lr=1e-3, decay_ramp=0.5).travel > 1.2 * plan_of(lr=1e-3).travel
    assert plan_of(lr=1e-3, masked_rate=4.0).travel > 2 * plan_of(lr=1e-3).travel


@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_plan_counts(plan_of, tiny_models, model_name):
    plan = plan_of(model_name=model_name, steps=10)
    assert plan.parameters == sum(p.numel() for p in tiny_models[model_name]().parameters())
    projections = {
        "llama": 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64,
        "gpt2": 32 * 96 + 32 * 32 + 2 * 32 * 128,
    }
    assert plan.sparse_parameters == 2 * projections[model_name]
    assert plan.tokens == 10 * 4 * 32
    assert plan.epochs == pytest.approx(10 * 4 / 100)


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 4 * 32 * 3 + 1}, 4),
        ({"epochs": 2.0}, 50),
        ({"epochs": 0.001}, 1),
        ({}, 25),
    ],
)
def test_step_count(make_config, budget, steps):
    config = make_config(**({"steps": None} | budget))
    assert step_count(config, train_blocks=100, context=32) == steps


@pytest.mark.parametrize(
    ("travel", "verdict"), [(3.01, "ok"), (2.99, "short"), (1.51, "short"), (1.49, "refused")]
)
def test_verdict(plan_of, travel, verdict):
    plan = plan_of(steps=100, lr=lr_for(plan_of, travel, 100))
    assert plan.verdict == verdict


def test_check_travel(plan_of):
    assert check_travel(plan_of(lr=lr_for(plan_of, 3.5, 12)), allowed=False) is None
    warning = check_travel(plan_of(lr=lr_for(plan_of, 2, 12)), allowed=False)
    assert warning is not None and "travel 2.00" in warning
    short = plan_of(lr=lr_for(plan_of, 1, 12))
    with pytest.raises(RunError, match=r"travel 1\.00.*--allow-short-travel"):
        check_travel(short, allowed=False)
    forced = check_travel(short, allowed=True)
    assert forced is not None and "destroys" in forced


def test_default_rate_travels_far_enough(plan_of):
    plan = plan_of(lr=None, steps=1000)
    assert plan.travel == pytest.approx(3)
    assert plan.verdict == "ok"


def test_a_model_that_is_sparse_already_has_no_default_rate(plan_of):
    """As any pruning tool writes it: nothing but its weights says that it is 2:4."""

    def prune(model):
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.data *= nm_mask(layer.weight)

    with pytest.raises(RunError, match=r"lr: must be given: .* train the dense model"):
        plan_of(change_model=prune, lr=None)
    assert plan_of(change_model=prune, lr=1e-4).travel == math.inf


def test_default_rate_is_bounded(plan_of):
    # A few steps cannot be rescued by a rate that diverges: they are refused.
    plan = plan_of(lr=None, steps=5)
    assert plan.lr == HIGHEST_DEFAULT_LR
    assert plan.verdict == "refused"


def test_render_plan(plan_of, make_config):
    text = io.StringIO()
    console = Console(file=text, width=160)
    console.print(render_plan(plan_of(), make_config(pattern="4:8", export="packed")))
    lines = text.getvalue().splitlines()
    down = next(line for line in lines if "model.layers.*.mlp.down_proj" in line)
    assert "32 x 64" in down and "sparsify" in down
    assert "outside the decoder blocks" in next(line for line in lines if "lm_head" in line)
    assert "only 2:4 packs, not 4:8" in text.getvalue()


@pytest.mark.parametrize(("lr", "status"), [("5e-3", 0), ("1e-5", 2)])
def test_dry_run(llama_dir, text_file, tmp_path, capsys, lr, status):
    places = ["--model", str(llama_dir), "--data", str(text_file), "--output", str(tmp_path / "o")]
    flags = ["--context", "32", "--steps", "50", "--lr", lr, "--device", "cpu", "--dry-run"]
    found = main([*places, *flags])
    out, err = capsys.readouterr()
    assert found == status
    assert "12.8 k in 50 steps of 256 (8 x 1 x 32)" in out
    assert "travel" in out
    assert list(tmp_path.iterdir()) == []
    if status:
        assert err.startswith("cast-train: error: travel 0.0")
        assert err.count("\n") == 1
    else:
        assert err == ""


def test_fsdp_in_one_process_is_told(llama_dir, text_file, tmp_path, capsys):
    arguments = ["--model", str(llama_dir), "--data", str(text_file), "--steps", "2"]
    places = ["--output", str(tmp_path / "out"), "--context", "32", "--device", "cpu"]
    arguments += [*places, "--allow-short-travel", "--dry-run"]
    for more, told in (([], False), (["--parallel", "fsdp"], True)):
        assert main([*arguments, *more]) == 0
        assert ("in one process shards nothing" in capsys.readouterr().out) is told


@pytest.mark.parametrize(
    ("budget", "steps"), [({"steps": 10**30}, r"1e\+30"), ({"epochs": 1e308}, "inf")]
)
def test_budget_without_end_is_refused(make_config, budget, steps):
    config = make_config(**{"steps": None} | budget)
    with pytest.raises(RunError, match=rf"the budget is {steps} steps; give one of at most 1e\+08"):
        step_count(config, train_blocks=80, context=16)


@pytest.mark.parametrize("lr", [None, 1e-3])
def test_a_rate_that_is_zero_in_every_step_is_refused(plan_of, lr):
    with pytest.raises(RunError, match="lr_floor: 0 is the rate of the run's only step"):
        plan_of(steps=1, lr_floor=0.0, lr=lr)
