"""Whole runs of tiny models: determinism, what is written, what is refused."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from training_state import read_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from cast_serve.kernels.packing import check, unpack
from cast_serve.kernels.pattern import nm_mask
from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.trainer import train
from cast_serve.trainer.calibrate import measure_lambda
from cast_serve.trainer.data import BlockStream
from cast_serve.trainer.data_source import DataSource
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.evaluation.mean_loss import mean_loss
from cast_serve.trainer.gradient import Gradient
from cast_serve.trainer.guard import Guard
from cast_serve.trainer.journal import read_history
from cast_serve.trainer.layers import add_scales, choose_layers
from cast_serve.trainer.output import output_errors
from cast_serve.trainer.processes import ALONE
from cast_serve.trainer.run_dir import checkpoints
from cast_serve.trainer.source import load_source

QUIET = Console(quiet=True)
PROJECTION = "model.layers.1.mlp.down_proj"


def run(config):
    train.run(config, QUIET)
    return load_file(config.output / "model.safetensors")


def folded(training, name, *, kept=2, group=4):
    """What a layer of a training checkpoint is served as, in fp32."""
    weight, scale = training[f"{name}.weight"], training[f"{name}.cast_scale"]
    pruned = weight * nm_mask(weight, kept=kept, group=group)
    return pruned * scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, llama_dir, text_file):
    """(config, weights) of one short run exported in training form."""
    from cast_serve.trainer.config import RunConfig

    config = RunConfig(
        model=llama_dir,
        data=(DataSource(place=str(text_file)),),
        output=tmp_path_factory.mktemp("trained") / "out",
        steps=12,
        context=32,
        batch_size=4,
        lr=2e-3,
        lambda_=1e-4,
        device="cpu",
        export="training",
        allow_short_travel=True,
        log_steps=2,
    )
    return config, run(config)


def test_same_seed_same_bits(trained, make_config):
    _, first = trained
    second = run(make_config(allow_short_travel=True))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_seed_other_weights(trained, make_config):
    _, first = trained
    other = run(make_config(allow_short_travel=True, seed=1))
    assert not torch.equal(first[f"{PROJECTION}.weight"], other[f"{PROJECTION}.weight"])


def test_training_form(trained, llama_dir):
    config, weights = trained
    stock = load_file(llama_dir / "model.safetensors")
    assert {name for name in weights if not name.endswith(".cast_scale")} == set(stock)
    scale = weights[f"{PROJECTION}.cast_scale"]
    assert scale.shape == (32, 2)
    assert not torch.equal(scale, torch.ones_like(scale))
    assert weights[f"{PROJECTION}.weight"].dtype == torch.float32
    written = json.loads((config.output / "config.json").read_text())
    assert written.pop("quantization_config") == {
        "quant_method": "cast",
        "format": "training",
        "sparsity": "2:4",
        "ignore": ["lm_head"],
        "version": 1,
    }
    assert written == json.loads((llama_dir / "config.json").read_text()) | {"dtype": "float32"}
    AutoTokenizer.from_pretrained(config.output)


def test_provenance(trained):
    config, _ = trained
    record = json.loads((config.output / "cast.json").read_text())
    assert record["teacher"] == "llama"
    assert record["tokens"] == 12 * 4 * 32
    assert record["lambda"] == 1e-4
    assert record["evaluation"]["perplexity_after_prune"] > 1
    assert str(config.model.parent) not in json.dumps(record)


def test_logs_and_plots(trained):
    config, _ = trained
    entries = read_history(config.run_dir)
    assert [entry["step"] for entry in entries] == [1, *range(2, 13, 2)]
    entry = entries[-1]
    assert entry["tokens"] == 12 * 4 * 32
    assert entry["tokens_per_s"] > 0
    assert entry["loss"] == pytest.approx(entry["kl"] / 3 + entry["ce"] * 2 / 3, rel=1e-4)
    assert entry["masked_magnitude"] < entry["kept_magnitude"]
    assert 0 < entry["sparse_weight_ratio"] < 1
    assert 0 <= entry["mask_flips"] < 1
    plots = {path.name: path.read_bytes()[:4] for path in (config.run_dir / "plots").iterdir()}
    names = ("loss", "magnitudes", "mask_flips", "sparse_weight_ratio")
    assert plots == {f"{name}.png": b"\x89PNG" for name in names}
    assert any((config.run_dir / "logs").glob("events.out.tfevents.*"))


def test_export_packed(trained, make_config):
    _, training = trained
    packed = run(make_config(allow_short_travel=True, export="packed", dtype="float32"))
    found = unpack(packed[f"{PROJECTION}.compressed"], packed[f"{PROJECTION}.bitmask"])
    assert torch.equal(found, folded(training, PROJECTION))


def test_export_dense_has_the_dtype_of_the_model(trained, make_config):
    _, training = trained
    config = make_config(allow_short_travel=True, export="dense")
    dense = run(config)[f"{PROJECTION}.weight"]
    assert torch.equal(dense, folded(training, PROJECTION).to(torch.bfloat16))
    assert check(dense).ok


def test_export_other_pattern_is_a_stock_checkpoint(make_config):
    config = make_config(allow_short_travel=True, pattern="1:4", export="packed")
    run(config)
    model = AutoModelForCausalLM.from_pretrained(config.output)
    weight = model.get_submodule(PROJECTION).weight
    assert ((weight.reshape(-1, 4) != 0).sum(1) <= 1).all()
    assert (weight != 0).any()
    assert model.dtype == torch.bfloat16
    assert json.loads((config.output / "cast.json").read_text())["sparsity"] == "1:4"


def test_export_gpt2_keeps_the_layout_in_training_and_packs_outputs_by_inputs(
    make_config, gpt2_dir, tmp_path
):
    changes = {"model": gpt2_dir, "allow_short_travel": True, "steps": 4}
    training = run(make_config(**changes))
    name = "transformer.h.0.mlp.c_fc"
    assert training[f"{name}.weight"].shape == (32, 128)
    assert training[f"{name}.cast_scale"].shape == (128, 2)
    packed = run(make_config(**changes, export="packed", output=tmp_path / "packed"))
    found = unpack(packed[f"{name}.compressed"], packed[f"{name}.bitmask"])
    by_outputs = training | {f"{name}.weight": training[f"{name}.weight"].t().contiguous()}
    assert torch.equal(found, folded(by_outputs, name))


def test_measure_lambda_is_the_rms_gradient(make_config, tiny_models):
    config = make_config(clip=0.0, eta=0.25, batch_size=2)
    model = tiny_models["llama"]()
    stream = BlockStream(torch.randint(257, (40, 32), dtype=torch.int32), length=40, seed=0)
    squares = []
    for step in range(8):
        ids = torch.stack([stream[2 * step + i]["input_ids"] for i in range(2)])
        model.zero_grad()
        (0.75 * model(input_ids=ids, labels=ids).loss).backward()
        weights = [p for name, p in model.named_parameters() if name.endswith("_proj.weight")]
        squares.append(torch.cat([p.grad.flatten() for p in weights]).square().mean())
    expected = torch.stack(squares).mean().sqrt().item()
    model.zero_grad()
    layers = choose_layers(model, config.nm, scaling_blocks=2)
    add_scales(model, layers, scaling_blocks=2)
    gradient = Gradient(config, model, None, stream, ALONE)
    assert measure_lambda(gradient) == pytest.approx(expected, rel=1e-4)
    gradient.config = make_config(clip=1e-3, eta=0.25, batch_size=2)
    assert measure_lambda(gradient) < expected / 100


def test_lambda_is_measured_and_kept(make_config):
    config = make_config(allow_short_travel=True, lambda_=None, steps=2)
    run(config)
    fixed = json.loads((config.run_dir / "run.json").read_text())["fixed"]
    assert 1e-6 < fixed["lambda_"] < 1e-1
    assert json.loads((config.output / "cast.json").read_text())["lambda"] == fixed["lambda_"]


def test_lambda_cannot_be_measured_by_the_teacher_alone(make_config):
    with pytest.raises(RunError, match="lambda: must be given with eta=1"):
        run(make_config(lambda_=None, eta=1.0))


def test_bf16_compute_keeps_fp32_master_weights(trained, make_config):
    _, exact = trained
    weights = run(make_config(allow_short_travel=True, compute="bf16"))
    weight = weights[f"{PROJECTION}.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())
    # The same run up to the rounding of its arithmetic.
    moved = exact[f"{PROJECTION}.weight"]
    assert not torch.equal(weight, moved)
    assert torch.nn.functional.cosine_similarity(weight.flatten(), moved.flatten(), dim=0) > 0.99


def test_gradient_checkpointing_changes_nothing(trained, make_config):
    _, exact = trained
    weights = run(make_config(allow_short_travel=True, gradient_checkpointing=True))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, exact[name])


def test_gradient_accumulation_is_a_larger_batch(trained, make_config):
    _, exact = trained
    weights = run(make_config(allow_short_travel=True, batch_size=2, gradient_accumulation=2))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, exact[name], rtol=1e-3, atol=1e-4)


def test_eta_zero_has_no_teacher(make_config, monkeypatch):
    def fail(*_):
        raise AssertionError("a teacher was made")

    monkeypatch.setattr(train, "make_teacher", fail)
    config = make_config(allow_short_travel=True, eta=0.0, steps=2)
    run(config)
    assert "kl" not in read_history(config.run_dir)[0]


def test_exploding_loss_stops_the_run(make_config):
    # The rate rises slowly to what no model survives, so some checkpoints are from before.
    config = make_config(allow_short_travel=True, lr=3.0, warmup=0.9, save_steps=1, steps=2000)
    with pytest.raises(RunError, match=r"the (loss|gradient|update)") as caught:
        run(config)
    saved = checkpoints(config.run_dir)
    assert f"the last good checkpoint is {saved[-1]}" in str(caught.value)
    state = read_checkpoint(saved[-1])
    assert all(value.isfinite().all() for value in state.values() if torch.is_tensor(value))
    assert not config.output.exists()


@pytest.mark.parametrize("steps", [1, 6])
def test_an_update_that_ruins_the_model_is_not_saved(make_config, steps):
    """Its loss was taken before it; and after the last one there is no other."""
    config = make_config(allow_short_travel=True, lr=1e10, steps=steps, save_steps=1, warmup=0.0)
    message = "the update of step 1 takes the cross-entropy to .*; there is no checkpoint before it"
    with pytest.raises(RunError, match=message):
        run(config)
    assert not checkpoints(config.run_dir)
    assert not config.output.exists()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_model_that_began_worse_than_a_guess_may_go_on(llama_dir, tmp_path, make_config, eta):
    """With a limit that allows it; and KL alone does not ask for the text's cross-entropy."""
    folder = shutil.copytree(llama_dir, tmp_path / "sure")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] *= 60
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    limit = 100.0 if eta == 0 else None
    run(
        make_config(
            model=folder,
            allow_short_travel=True,
            lr=2e-4,
            eta=eta,
            loss_limit=limit,
            steps=4,
            save_steps=2,
        )
    )


def test_loss_limit(make_config):
    config = make_config(allow_short_travel=True, loss_limit=1.0)
    with pytest.raises(RunError, match=r"above the limit of 1, by step 1; there is no checkpoint"):
        run(config)


def test_the_guard_is_asked_once_a_step(make_config, monkeypatch):
    """Each time the processes add up their losses, and the GPU is waited for."""
    check, steps = Guard.check, []

    def counted(self, run_dir, step):
        steps.append(step)
        check(self, run_dir, step)

    monkeypatch.setattr(Guard, "check", counted)
    run(make_config(allow_short_travel=True, steps=6, log_steps=2, save_steps=3, eval_steps=4))
    assert steps == [1, 2, 3, 4, 6]


def test_long_run_empties_the_masked_weights(make_config):
    # The point of the method: at travel 3 and a lambda of the gradient's order, the prune is free.
    config = make_config(lr=None, lambda_=None, steps=400, context=16, batch_size=2)
    run(config)
    record = json.loads((config.output / "cast.json").read_text())["evaluation"]
    assert read_history(config.run_dir)[-1]["sparse_weight_ratio"] > 0.99
    change = record["perplexity_after_prune"] / record["perplexity_before_prune"]
    assert change == pytest.approx(1, abs=0.01)


def test_mean_loss(llama_dir):
    model = load_source(llama_dir).model.train()
    windows = torch.randint(257, (5, 32))
    with torch.no_grad():
        loss = model.eval()(input_ids=windows, labels=windows).loss
    model.train()
    assert mean_loss(model, windows, batch_size=2) == pytest.approx(loss.item(), rel=1e-6)
    assert model.training


def test_source_trains_in_fp32_whatever_is_stored(llama_dir):
    source = load_source(llama_dir)
    assert source.dtype == torch.bfloat16
    assert {p.dtype for p in source.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot load"),
        (
            lambda folder: remove(folder, "tokenizer*.json"),
            r"holds no tokenizer, neither tokenizer\*\.json nor vocab\*",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "cannot load"),
        (
            lambda folder: (folder / "config.json").write_text(
                '{"quantization_config": {"quant_method": "cast"}}'
            ),
            r"quantized or sparse already \(quant_method cast\)",
        ),
        (
            lambda folder: edit_config(folder, hidden_size="32"),
            "Validation error for field 'hidden_size': TypeError: .* expected int, got str",
        ),
        (lambda folder: edit_config(folder, num_attention_heads=0), "modulo by zero"),
        (lambda folder: edit_config(folder, dtype="bf15"), "cannot load .* no attribute 'bf15'"),
    ],
    ids=[
        *("no config", "bad config", "no weights", "no tokenizer", "cut weights", "sparse"),
        *("size of another type", "no heads", "no dtype"),
    ],
)
def test_source_errors(llama_dir, tmp_path, make_config, damage, message):
    folder = shutil.copytree(llama_dir, tmp_path / "model")
    damage(folder)
    with pytest.raises(RunError, match=message) as caught:
        run(make_config(model=folder))
    assert "\n" not in str(caught.value)


def remove(folder, names):
    for path in folder.glob(names):
        path.unlink()


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_quantization_of_null_is_none(llama_dir, tmp_path):
    folder = shutil.copytree(llama_dir, tmp_path / "model")
    edit_config(folder, quantization_config=None)
    assert load_source(folder).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama_dir", "gpt2_dir"])
def test_a_config_of_fewer_layers_is_refused(request, tmp_path, name):
    folder = shutil.copytree(request.getfixturevalue(name), tmp_path / "model")
    edit_config(folder, **{"num_hidden_layers" if name == "llama_dir" else "n_layer": 1})
    with pytest.raises(RunError, match=r"holds .*\.1\..*\.weight, which the model of its config"):
        load_source(folder)


def test_weights_of_no_block_are_left_alone(llama_dir, tmp_path):
    """Buffers that older releases wrote, and a head that scores."""
    beside = {"model.layers.0.self_attn.rotary_emb.inv_freq": 8, "score.weight": 2}

    def edit(tensors):
        tensors.update({name: torch.ones(size) for name, size in beside.items()})

    load_source(break_source(llama_dir, tmp_path / "model", edit))


# Llama 2's, which transformers reads and refuses to write.
GENERATION = '{"temperature": 0.9, "top_p": 0.6}'


@pytest.mark.parametrize("export", ["training", "packed", "dense"])
@pytest.mark.parametrize("name", ["llama_dir", "gpt2_dir"])
def test_generation_defaults_are_copied_as_they_are(request, make_config, tmp_path, name, export):
    folder = shutil.copytree(request.getfixturevalue(name), tmp_path / "model")
    (folder / "generation_config.json").write_text(GENERATION)
    pattern = "1:4" if export == "dense" else "2:4"
    changes = {"model": folder, "export": export, "pattern": pattern}
    config = make_config(**changes, steps=1, allow_short_travel=True)
    run(config)
    assert (config.output / "generation_config.json").read_text() == GENERATION


def test_generation_defaults_are_not_made_up(make_config, llama_dir, tmp_path):
    """Of a model whose config.json has them, as older ones do."""
    folder = shutil.copytree(llama_dir, tmp_path / "model")
    (folder / "generation_config.json").unlink()
    edit_config(folder, temperature=0.9)
    config = make_config(model=folder, steps=1, allow_short_travel=True)
    run(config)
    assert not (config.output / "generation_config.json").exists()
    assert json.loads((config.output / "config.json").read_text())["temperature"] == 0.9


@pytest.mark.parametrize("there", [True, False], ids=["to a folder", "to none yet"])
def test_output_behind_a_link(make_config, tmp_path, there):
    config = make_config(steps=1, allow_short_travel=True, save_steps=1)
    elsewhere = tmp_path / "disk/elsewhere"
    if there:
        elsewhere.mkdir(parents=True)
    config.output.symlink_to(elsewhere)
    run(config)
    (elsewhere / "model.safetensors").unlink()
    # Written again over what is there.
    run(dataclasses.replace(config, resume=True))
    assert config.output.is_symlink()
    assert (elsewhere / "model.safetensors").is_file()
    assert [path.name for path in elsewhere.parent.iterdir()] == ["elsewhere"]


def test_a_mount_point_is_refused(make_config, monkeypatch):
    config = make_config()
    config.output.mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: path == config.output)
    with pytest.raises(RunError, match=r"is a mount point, .*; name one in it, such as .*/sparse"):
        run(config)


def test_nothing_is_written_to_the_folder_of_the_model(make_config, llama_dir, tmp_path):
    folder = shutil.copytree(llama_dir, tmp_path / "model")
    held = sorted(folder.iterdir())
    with pytest.raises(RunError, match=f"is in the folder that is read, {folder}; choose another"):
        run(make_config(model=folder, output=folder / "sparse"))
    assert sorted(folder.iterdir()) == held


def test_output_is_not_overwritten(make_config):
    config = make_config()
    config.output.mkdir()
    (config.output / "mine").touch()
    with pytest.raises(RunError, match="is not an empty folder; choose another"):
        run(config)


@pytest.mark.parametrize("folder", ["output", "run_dir"])
def test_files_are_not_overwritten(make_config, folder):
    config = make_config()
    getattr(config, folder).touch()
    with pytest.raises(RunError, match=f"output: {getattr(config, folder)} is a file; name "):
        run(config)


def test_earlier_run_is_not_overwritten(trained, make_config):
    config, _ = trained
    with pytest.raises(RunError, match="is not an empty folder"):
        run(config)
    elsewhere = make_config()
    elsewhere.run_dir.mkdir()
    (elsewhere.run_dir / "run.json").touch()
    with pytest.raises(RunError, match="holds an earlier run; continue it with --resume"):
        run(elsewhere)


def test_output_that_cannot_be_written(make_config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="output: cannot write"):
        run(make_config(output=tmp_path / "file" / "out", allow_short_travel=True))


def test_context_beyond_the_model(make_config):
    with pytest.raises(RunError, match="context: 65 is more than the model's 64 positions"):
        run(make_config(context=65))


@pytest.mark.slow
def test_compile_is_the_same_run(trained, make_config):
    """Up to the rounding of compiled code."""
    _, exact = trained
    weights = run(make_config(allow_short_travel=True, compile=True))
    weight, moved = weights[f"{PROJECTION}.weight"], exact[f"{PROJECTION}.weight"]
    assert torch.nn.functional.cosine_similarity(weight.flatten(), moved.flatten(), dim=0) > 0.99


def break_source(
    source: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], None]
) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda tensors: tensors.pop(f"{PROJECTION}.weight"), "is missing"),
        (lambda tensors: tensors[f"{PROJECTION}.weight"].fill_(float("nan")), "holds a NaN"),
    ],
)
def test_unusable_source_is_refused(make_config, tmp_path, edit, reason):
    """transformers makes up what is missing, and a NaN would pass the travel check."""
    config = make_config(dry_run=True)
    broken = break_source(config.model, tmp_path / "broken", edit)
    with pytest.raises(RunError, match=f"{PROJECTION}.weight {reason}"):
        train.run(dataclasses.replace(config, model=broken), Console(quiet=True))


def test_dry_run_refuses_what_the_run_would(make_config):
    config = make_config(dry_run=True)
    config.output.mkdir(parents=True)
    (config.output / "something").touch()
    with pytest.raises(RunError, match="is not an empty folder"):
        train.run(config, Console(quiet=True))


@pytest.mark.parametrize("output", [".", "/", ".."])
def test_output_names_a_folder(make_config, output):
    with pytest.raises(RunError, match="names no new folder"):
        make_config(output=Path(output))


@pytest.mark.parametrize(
    ("error", "cause", "end"),
    [
        (OSError(28, "No space left on device"), None, "; make room and start it again"),
        (CheckpointError(Path("out"), "a weight overflows"), None, "overflows); start it again"),
        (
            CheckpointError(Path("out"), "is full"),
            OSError(28, ""),
            "; make room and start it again",
        ),
    ],
    ids=["disk", "weights", "disk, by a checkpoint"],
)
def test_room_is_asked_for_where_the_disk_refuses(error, cause, end):
    with pytest.raises(RunError) as caught, output_errors(Path("out"), trained=False):
        raise error from cause
    assert str(caught.value).endswith(end)
