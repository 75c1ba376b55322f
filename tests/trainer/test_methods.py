"""Whole runs of every method: exact N:M, fixed masks, exact resumption, evaluation on the way."""

import dataclasses
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from training_state import read_checkpoint
from transformers import AutoModelForCausalLM

from cast_serve.kernels.packing import unpack
from cast_serve.kernels.pattern import nm_mask
from cast_serve.trainer import train
from cast_serve.trainer.config import DEFAULT_ADAMW_LR, RunConfig
from cast_serve.trainer.config_checks import METHODS_OF
from cast_serve.trainer.data import BlockStream, load_corpus
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.evaluation.mean_loss import mean_loss
from cast_serve.trainer.gradient import Gradient
from cast_serve.trainer.journal import read_history
from cast_serve.trainer.layers import choose_layers
from cast_serve.trainer.methods import METHODS, method_of
from cast_serve.trainer.methods.start import prune_at_start
from cast_serve.trainer.methods.untrained import prune_without_training
from cast_serve.trainer.objective import Objective
from cast_serve.trainer.preview import preview, pruned
from cast_serve.trainer.source import load_source

QUIET = Console(quiet=True)
PROJECTION = "model.layers.1.mlp.down_proj"
SPARSE = [name for name in METHODS if name != "dense"]
BASELINES = [name for name in METHODS if name != "cast"]


def settings(method: str, **changes: object) -> dict[str, object]:
    """Of a short run; lambda only where there is a decay."""
    decay = {"cast": 1e-4, "sr-ste": 0.1, "ast": 0.1}.get(method)
    base = {"method": method, "lambda_": decay, "export": "dense", "dtype": "float32"}
    interval = {"mask_interval": 3} if method in METHODS_OF["mask_interval"] else {}
    return base | {"allow_short_travel": True} | interval | changes


def run(config: RunConfig) -> dict[str, torch.Tensor]:
    train.run(config, QUIET)
    return load_file(config.output / "model.safetensors")


def projections(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights.items() if name.endswith("_proj.weight")}


def history(config: RunConfig) -> list[dict[str, float]]:
    return read_history(config.run_dir)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("method", "pattern"), [*((method, "2:4") for method in SPARSE), ("ast", "1:4")]
)
def test_ends_with_exactly_n_of_m(make_config, method, pattern):
    kept = int(pattern[0])
    config = make_config(**settings(method, pattern=pattern))
    for name, weight in projections(run(config)).items():
        assert ((weight.reshape(-1, 4) != 0).sum(1) == kept).all(), name
    state = read_checkpoint(config.run_dir / "checkpoint-12")
    assert (state[f"model.{PROJECTION}.cast_scale"] == 1).all() == (method != "cast")


def test_dense_prunes_nothing_and_trains(make_config, llama_dir):
    config = make_config(**settings("dense", export="packed"))
    weights, before = run(config), load_file(llama_dir / "model.safetensors")
    assert weights.keys() == before.keys()
    for name, weight in projections(weights).items():
        assert (weight != 0).all(), name
        assert not torch.equal(weight, before[name].float()), name
    record = json.loads((config.output / "cast.json").read_text())
    evaluation = record["evaluation"]
    assert evaluation["perplexity_after_prune"] == evaluation["perplexity_before_prune"]
    assert "quantization_config" not in json.loads((config.output / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(config.output)
    assert torch.equal(loaded.get_submodule(PROJECTION).weight, weights[f"{PROJECTION}.weight"])


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_fixed_mask_is_the_mask_of_the_start(request, make_config, model):
    folder = request.getfixturevalue(f"{model}_dir")
    weights = run(make_config(**settings("fixed-mask", model=folder)))
    start = load_source(folder).model
    for layer in choose_layers(start, make_config().nm, scaling_blocks=2):
        if layer.dense_because is None:
            turn = (lambda w: w) if model == "llama" else (lambda w: w.t())
            before = turn(start.get_submodule(layer.name).weight.detach())
            after = turn(weights[f"{layer.name}.weight"])
            mask = nm_mask(before, kept=2, group=4)
            assert torch.equal(after != 0, mask), layer.name
            assert not torch.equal(after[mask], before[mask]), layer.name


@pytest.mark.parametrize("method", ["cast", "ast"])
def test_dense_rate_is_of_what_stays_dense(make_config, tmp_path, llama_dir, method):
    """After one step, which is as long as the rate."""
    before = load_file(llama_dir / "model.safetensors")
    after = {}
    for share in (1.0, 0.25):
        output = tmp_path / str(share)
        config = make_config(**settings(method, steps=1, dense_rate=share), output=output)
        train.run(config, QUIET)
        after[share] = read_checkpoint(config.run_dir / "checkpoint-1")
    for name, tensor in before.items():
        whole, quarter = (after[share][f"model.{name}"] - tensor.float() for share in (1.0, 0.25))
        assert whole.abs().max() > 0, name
        expected = whole if name.endswith("_proj.weight") else whole / 4
        torch.testing.assert_close(quarter, expected, rtol=0.01, atol=1e-6)


def test_the_teacher_of_a_fixed_mask_is_dense(make_config):
    config = make_config(**settings("fixed-mask", steps=1, log_steps=1))
    run(config)
    # A pruned student against a pruned teacher would have no KL in its first step.
    assert history(config)[0]["kl"] > 1e-6


@pytest.mark.parametrize("method", ["sr-ste", "ast"])
def test_masks_of_straight_through_methods_move(make_config, method):
    config = make_config(**settings(method, log_steps=1, lr=5e-3))
    run(config)
    assert any(entry.get("mask_flips", 0) > 0 for entry in history(config))


@pytest.mark.parametrize("method", ["fixed-mask", "ast"])
def test_packed_export_is_the_dense_one(make_config, tmp_path, method):
    dense = run(make_config(**settings(method, steps=4)))
    packed = run(make_config(**settings(method, steps=4, export="packed", output=tmp_path / "p")))
    found = unpack(packed[f"{PROJECTION}.compressed"], packed[f"{PROJECTION}.bitmask"])
    assert torch.equal(found, dense[f"{PROJECTION}.weight"])


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_bit_exact(make_config, gpt2_dir, tmp_path, monkeypatch, method):
    """GPT-2: Conv1D, and dropout, so the random state has to come back too."""
    changes = {"model": gpt2_dir, "save_steps": 4, "eval_steps": 3, "log_steps": 2}
    straight = make_config(**settings(method, **changes))
    expected = run(straight)
    broken = make_config(**settings(method, **changes, output=tmp_path / "broken"))

    class Interrupted(Exception):
        pass

    compute, done = Gradient.accumulate, []

    def interrupted(self, *arguments, **options):
        # The 11th step: 10 is no step of a checkpoint, nor one that refreshes ast's mask.
        if len(done) == 10:
            raise Interrupted
        done.append(None)
        return compute(self, *arguments, **options)

    monkeypatch.setattr(Gradient, "accumulate", interrupted)
    with pytest.raises(Interrupted):
        run(broken)
    monkeypatch.undo()
    assert same(run(dataclasses.replace(broken, resume=True)), expected)
    left, right = (
        [entry for entry in history(config) if "eval_loss" in entry]
        for config in (straight, broken)
    )
    assert [entry["step"] for entry in left] == [0, 3, 6, 9, 12]
    assert left == right


@pytest.mark.parametrize("method", ["cast", "dense", "ast"])
def test_evaluation_on_the_way_changes_nothing(make_config, gpt2_dir, tmp_path, method):
    changes = {"model": gpt2_dir, "log_steps": 2}
    quiet = make_config(**settings(method, **changes))
    watched = make_config(**settings(method, **changes, eval_steps=2, output=tmp_path / "watched"))
    assert same(run(quiet), run(watched))
    losses = [[e["loss"] for e in history(c) if "loss" in e] for c in (quiet, watched)]
    assert losses[0] == losses[1]
    assert any((watched.run_dir / "logs").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_is_of_the_model_that_would_be_written(make_config, tmp_path, method):
    config = make_config(**settings(method, eval_steps=12))
    run(config)
    first, last = (entry for entry in history(config) if "eval_loss" in entry)
    evaluation = json.loads((config.output / "cast.json").read_text())["evaluation"]
    assert last["eval_perplexity"] == evaluation["perplexity_before_prune"]
    if method == "dense":
        assert "eval_loss_pruned" not in last
    else:
        assert last["eval_perplexity_pruned"] == evaluation["perplexity_after_prune"]
        assert first["eval_loss_pruned"] != last["eval_loss_pruned"]
    plots = {path.stem for path in (config.run_dir / "plots").iterdir()}
    assert "perplexity" in plots


def test_first_evaluation_is_of_the_dense_model_and_of_one_shot_magnitude(make_config):
    config = make_config(**settings("cast", eval_steps=12))
    run(config)
    first = next(entry for entry in history(config) if "eval_loss" in entry)
    source = load_source(config.model)
    corpus = load_corpus(config.data, source.tokenizer, context=32, held_out=config.held_out)
    assert first["eval_loss"] == pytest.approx(mean_loss(source.model, corpus.evaluation))
    assert first["eval_loss_pruned"] == pytest.approx(loss_after_prune(config, "magnitude"))


@pytest.mark.parametrize("method", SPARSE)
def test_pruned_gives_the_model_back_when_it_fails(make_config, tiny_models, method):
    config = make_config(**settings(method))
    model = tiny_models["llama"]()
    layers = choose_layers(model, config.nm, scaling_blocks=2)
    text = torch.randint(257, (4, 32), dtype=torch.int32)
    stream = BlockStream(text, length=4, seed=0)
    method_of(config).add_layers(model, layers, stream, resumed=False)
    for name, parameter in model.named_parameters():
        if name.endswith("cast_scale"):
            parameter.data.uniform_(0.5, 2)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with pytest.raises(ZeroDivisionError), pruned(model, config.nm):
        inside = model.get_submodule(PROJECTION).weight
        assert ((inside.reshape(-1, 4) != 0).sum(1) == 2).all()
        raise ZeroDivisionError
    assert same(before, {name: tensor.detach() for name, tensor in tensors.items()})
    assert preview(model, text, config.nm).keys() == {
        f"eval_{what}{of}" for what in ("loss", "perplexity") for of in ("", "_pruned")
    }


def test_an_evaluation_takes_no_more_sequences_at_once_than_training(make_config, monkeypatch):
    """Else a run that fits its GPU could end at its first evaluation."""
    seen = []
    loss = Objective.__call__

    def watch(self, model, head, ids, *more, **options):
        seen.append(len(ids))
        return loss(self, model, head, ids, *more, **options)

    monkeypatch.setattr(Objective, "__call__", watch)
    run(make_config(**settings("cast", steps=2, batch_size=1, held_out=0.2, eval_steps=1)))
    assert len(seen) > 10
    assert set(seen) == {1}


@pytest.mark.parametrize("method", ["fixed-mask", "sr-ste", "ast"])
def test_scales_are_learned_when_asked(make_config, method):
    config = make_config(**settings(method, steps=4, scale_baselines=True))
    weight = run(config)[f"{PROJECTION}.weight"]
    assert ((weight.reshape(-1, 4) != 0).sum(1) == 2).all()
    state = read_checkpoint(config.run_dir / "checkpoint-4")
    assert (state[f"model.{PROJECTION}.cast_scale"] != 1).any()


@pytest.mark.parametrize("method", BASELINES)
def test_adamw_has_a_rate_of_its_own_and_no_travel(make_config, method):
    config = make_config(
        **settings(method, steps=1, lr=None, lambda_=None, allow_short_travel=False)
    )
    run(config)
    fixed = json.loads((config.run_dir / "run.json").read_text())["fixed"]
    assert fixed["lr"] == DEFAULT_ADAMW_LR
    assert fixed["lambda_"] == {"sr-ste": 2e-4, "ast": 6e-5}.get(method, 0)
    record = json.loads((config.output / "cast.json").read_text())
    found = [record.get(key) for key in ("method", "lr", "lambda", "travel", "initial_mask")]
    mask = "magnitude" if method == "fixed-mask" else None
    assert found == [method, fixed["lr"], fixed["lambda_"], None, mask]


@pytest.mark.parametrize("method", ["fixed-mask", "ast"])
def test_bf16_and_accumulation(make_config, method):
    changes = {"compute": "bf16", "gradient_accumulation": 2, "batch_size": 2}
    weights = run(make_config(**settings(method, steps=3, **changes)))
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_fixed_mask_of_a_one_shot_method(make_config, tmp_path, method):
    pytest.importorskip("cast_serve.trainer.oneshot")
    config = make_config(**settings("fixed-mask", initial_mask=method, eval_steps=6))
    weights = projections(run(config))
    by_magnitude = projections(run(make_config(**settings("fixed-mask", output=tmp_path / "m"))))
    for name, weight in weights.items():
        assert ((weight.reshape(-1, 4) != 0).sum(1) == 2).all(), name
    moved = [
        name for name in weights if not torch.equal(weights[name] != 0, by_magnitude[name] != 0)
    ]
    assert moved
    record = json.loads((config.output / "cast.json").read_text())
    assert record["initial_mask"] == method


def test_cast_from_a_one_shot_start(make_config):
    changes = {"lr": 1e-4, "eval_steps": 6, "log_steps": 1, "allow_short_travel": False}
    config = make_config(**settings("cast", start="sparsegpt", **changes))
    # Travel would refuse this rate if there were anything to bring to zero.
    with pytest.raises(RunError, match="travel"):
        run(dataclasses.replace(config, start="dense"))
    weights = projections(run(config))
    for name, weight in weights.items():
        assert ((weight.reshape(-1, 4) != 0).sum(1) == 2).all(), name
    first = next(entry for entry in history(config) if "eval_loss" in entry)
    assert first["step"] == 0
    assert first["eval_loss"] == pytest.approx(loss_after_prune(config, "sparsegpt"))
    assert first["eval_loss"] != pytest.approx(loss_after_prune(config, "magnitude"), rel=1e-5)
    # The teacher has not been pruned: a student that equals it has a KL of 0.
    assert next(entry for entry in history(config) if "kl" in entry)["kl"] > 1e-6
    record = json.loads((config.output / "cast.json").read_text())
    assert (record["start"], record["travel"]) == ("sparsegpt", None)


def loss_after_prune(config, one_shot):
    """On the held-out text, of the dense model that `one_shot` has pruned."""
    source = load_source(config.model)
    corpus = load_corpus(config.data, source.tokenizer, context=32, held_out=config.held_out)
    prune_at_start(
        source.model,
        choose_layers(source.model, config.nm, scaling_blocks=2),
        one_shot,
        pattern=config.nm,
        stream=BlockStream(*corpus.parts, length=config.steps * config.batch_size, seed=0),
    )
    return mean_loss(source.model, corpus.evaluation)


def test_one_shot_method_that_prunes_other_layers(make_config):
    pytest.importorskip("cast_serve.trainer.oneshot")
    # Only down_proj has a K that 64 divides.
    config = make_config(**settings("fixed-mask", initial_mask="wanda", scaling_blocks=64))
    with pytest.raises(RunError, match="wanda: it prunes other layers than the run, such as model"):
        run(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dense", "lambda_": 1.0}, "lambda: method dense has no decay"),
        ({"method": "fixed-mask", "lambda_": 1.0}, "lambda: method fixed-mask has no decay"),
        (
            {"initial_mask": "wanda"},
            "initial_mask: is of method fixed-mask, not cast; leave it out",
        ),
        ({"method": "sr-ste", "mask_interval": 3}, "mask_interval: is of method cast, ast, not"),
        ({"start": "wanda", "parallel": "fsdp"}, "start: wanda prunes the whole model on one dev"),
        ({"start": "wanda", "lr": None}, "lr: must be given with start=wanda"),
        ({"method": "ast", "export": "training"}, "the training form is of method cast, not ast"),
        ({"eval_steps": 0}, "eval_steps: 0 is out of range; it must be finite and above 0"),
        ({"eval_steps": 1.5}, "eval_steps: 1.5 is out of range; it must be a whole number or a"),
    ],
)
def test_options_that_a_method_would_ignore(make_config, changes, message):
    with pytest.raises(RunError, match=message):
        make_config(**changes)


def test_full_disk_after_a_one_shot_prune(make_config, no_large_files):
    """What is large is not written in part, and one line says what to do."""
    config = make_config(**settings("fixed-mask"))
    message = r"cannot write .*out \(.*\); make room and start it"
    with no_large_files(), pytest.raises(RunError, match=message):
        prune_without_training(config)
    assert not config.output.exists()
    prune_without_training(config)
    record = json.loads((config.output / "cast.json").read_text())
    assert record["method"] == "one-shot magnitude"
    assert record["versions"].keys() == {"cast-serve", "torch", "transformers"}
