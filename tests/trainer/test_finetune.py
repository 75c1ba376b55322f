"""Fine-tuning: the pattern bit for bit, and merges that are exact."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from cast_serve.cli.model import app
from cast_serve.kernels.packing import unpack
from cast_serve.model_loaders.convert import convert
from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.model_loaders.prune import prune
from cast_serve.model_loaders.quantize import quantize
from cast_serve.model_loaders.rewrite import rewrite
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.finetune import train
from cast_serve.trainer.finetune.config import FinetuneConfig
from cast_serve.trainer.finetune.examples import load_examples, pad
from cast_serve.trainer.finetune.main import main
from cast_serve.trainer.finetune.pattern import add_lora, mask_gradients, merge
from cast_serve.trainer.sparse_source import load_sparse

QUIET = Console(quiet=True)
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def sparse_dirs(
    tmp_path_factory: pytest.TempPathFactory, llama_dir: Path, gpt2_dir: Path
) -> dict[str, Path]:
    """Packed 2:4 checkpoints in which some kept weights are zero, of the two weight layouts."""
    folder = tmp_path_factory.mktemp("sparse")
    made = {}
    for name, dense in (("llama", llama_dir), ("gpt2", gpt2_dir)):
        prune(dense, folder / f"{name}-pruned")
        convert(folder / f"{name}-pruned", folder / name, to="packed")
        file = folder / name / "model.safetensors"
        tensors = load_file(file)
        for key, tensor in tensors.items():
            if key.endswith(".compressed"):
                # A whole group and single slots: by its non-zeros each would be packed elsewhere.
                tensor[0, :2] = 0
                tensor[1:, 1::5] = 0
        save_file(tensors, file, metadata={"format": "pt"})
        made[name] = folder / name
    return made


@pytest.fixture
def make(
    sparse_dirs: dict[str, Path], text_file: Path, tmp_path: Path
) -> Callable[..., FinetuneConfig]:
    def build(**changes: Any) -> FinetuneConfig:
        settings: dict[str, Any] = {
            "model": sparse_dirs["llama"],
            "data": (text_file,),
            "output": tmp_path / "out",
            "steps": 6,
            "context": 32,
            "batch_size": 4,
            "lr": 1e-2,
            "weight_decay": 0.1,
            "device": "cpu",
        }
        return FinetuneConfig(**settings | changes)

    return build


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_pattern(source: Path, output: Path) -> None:
    """Every bitmask bit for bit, values that moved, and `cast-model check` says it is in order."""
    before, after = tensors_of(source), tensors_of(output)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.shape == after[name].shape and tensor.dtype == after[name].dtype
        if name.endswith((".bitmask", ".shape")):
            assert torch.equal(tensor, after[name]), name
        if name.endswith(".compressed"):
            assert not torch.equal(tensor, after[name]), name
    result = CliRunner().invoke(app, ["check", str(output)])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["full", "masked lora"])
def test_pattern_is_kept(
    make: Callable[..., FinetuneConfig], sparse_dirs: dict[str, Path], name: str, method: str
) -> None:
    lora = method != "full"
    config = make(model=sparse_dirs[name], lora=lora, merge=lora)
    train.run(config, QUIET)
    assert_same_pattern(config.model, config.output)
    record = json.loads((config.output / "cast.json").read_text())["finetune"]
    assert record["method"] == method and record["base"] == name
    assert record["evaluation"]["loss_after"] < record["evaluation"]["loss_before"]
    assert str(config.model.parent) not in json.dumps(record)


def test_zero_slots_are_trained(
    make: Callable[..., FinetuneConfig], sparse_dirs: dict[str, Path]
) -> None:
    config = make()
    train.run(config, QUIET)
    before, after = tensors_of(config.model), tensors_of(config.output)
    zero = before[f"{DOWN}.compressed"] == 0
    assert (after[f"{DOWN}.compressed"][zero] != 0).float().mean() > 0.9


def test_no_pruned_weight_is_ever_nonzero(
    make: Callable[..., FinetuneConfig], sparse_dirs: dict[str, Path]
) -> None:
    """Step by step, with momentum and weight decay: the mask is no clean-up at the end."""
    source = load_sparse(sparse_dirs["llama"])
    mask_gradients(source.sparse_modules())
    optimizer = torch.optim.AdamW(source.model.parameters(), lr=1e-2, weight_decay=0.5)
    for step in range(4):
        ids = torch.randint(1, 257, (2, 16), generator=torch.Generator().manual_seed(step))
        source.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for module, mask in source.sparse_modules():
            assert not module.weight[~mask].any()
    moments = optimizer.state[source.model.get_submodule(DOWN).weight]
    assert not moments["exp_avg"][~source.masks[DOWN]].any()
    assert moments["exp_avg"][source.masks[DOWN]].any()


def test_unmasked_training_would_break_the_pattern(sparse_dirs: dict[str, Path]) -> None:
    """The test above can fail: the loss does ask for pruned weights."""
    source = load_sparse(sparse_dirs["llama"])
    ids = torch.arange(1, 17)[None]
    source.model(input_ids=ids, labels=ids).loss.backward()
    weight = source.model.get_submodule(DOWN).weight
    assert weight.grad[~source.masks[DOWN]].abs().max() > 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_masked_lora_merges_exactly(sparse_dirs: dict[str, Path], name: str) -> None:
    source = load_sparse(sparse_dirs[name])
    model = add_lora(source, rank=4, alpha=8, targets=(), masked=True).eval()
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(0, 0.1, generator=generator)
    ids = torch.arange(1, 25)[None]
    with torch.inference_mode():
        trained = model(input_ids=ids).logits
        with model.disable_adapter():
            untouched = model(input_ids=ids).logits
    merged = merge(model)
    with torch.inference_mode():
        found = merged(input_ids=ids).logits
    torch.testing.assert_close(found, trained, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, untouched, atol=1e-2)
    for module_name, mask in source.masks.items():
        assert not merged.get_submodule(module_name).weight[~mask].any()


def test_merged_output_answers_as_the_trained_model(
    make: Callable[..., FinetuneConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the files that were written is the one that training ended with."""
    config = make(lora=True, merge=True, context=32)
    train.run(config, QUIET)
    record = json.loads((config.output / "cast.json").read_text())["finetune"]["evaluation"]
    source = load_sparse(config.output)
    held = load_examples(config.data, source.tokenizer, context=32, held_out=0.01).evaluation
    found = train.mean_loss(source.model, held, batch_size=4)
    # The files are bfloat16.
    assert found == pytest.approx(record["loss_after"], abs=5e-3)


def test_unmasked_lora_stays_separate(make: Callable[..., FinetuneConfig], tmp_path: Path) -> None:
    config = make(lora=True, lora_rank=4)
    train.run(config, QUIET)
    files = {path.name for path in config.output.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "cast.json"}
    adapter = json.loads((config.output / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "llama" and adapter["r"] == 4
    assert "q_proj" in adapter["target_modules"] and "lm_head" not in adapter["target_modules"]
    assert str(tmp_path) not in (config.output / "adapter_config.json").read_text()
    # peft puts it on the sparse base, and it does what the training ended with.
    convert(config.model, tmp_path / "dense", to="dense")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, config.output)
    tokenizer = load_sparse(config.model).tokenizer
    held = load_examples(config.data, tokenizer, context=32, held_out=0.01).evaluation
    record = json.loads((config.output / "cast.json").read_text())["finetune"]["evaluation"]
    assert train.mean_loss(model, held, batch_size=4) == pytest.approx(
        record["loss_after"], abs=1e-4
    )
    assert record["loss_after"] < record["loss_before"]


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_that_diverges_after_its_last_entry_writes_nothing(
    make: Callable[..., FinetuneConfig], lora: bool
) -> None:
    config = make(lora=lora, lr=1e30, steps=3, log_steps=10)
    with pytest.raises(RunError, match="is not finite after 3 steps; lower lr or raise warmup"):
        train.run(config, QUIET)
    assert not config.output.exists()


def test_a_loss_that_is_no_number_at_the_end_writes_nothing(
    make: Callable[..., FinetuneConfig],
) -> None:
    """Weights that are finite can still overflow a product."""
    config = make(lr=1e18, steps=1)
    with pytest.raises(RunError, match=r"the loss is (nan|inf) after 1 steps; lower lr or raise"):
        train.run(config, QUIET)
    assert not config.output.exists()


def test_another_pattern_is_refused(
    make: Callable[..., FinetuneConfig], sparse_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """A 1:4 layer is 2:4, too, and what it has room for would be filled."""
    shutil.copytree(sparse_dirs["llama"], tmp_path / "model")
    (tmp_path / "model" / "cast.json").write_text('{"sparsity": "1:4"}')
    with pytest.raises(RunError, match=r"model is 1:4, by its cast\.json; what keeps a pattern"):
        train.run(make(model=tmp_path / "model"), QUIET)


def test_lora_target(make: Callable[..., FinetuneConfig], sparse_dirs: dict[str, Path]) -> None:
    config = make(lora=True, merge=True, lora_target=("q_proj", "v_proj"))
    train.run(config, QUIET)
    before, after = tensors_of(config.model), tensors_of(config.output)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"model.layers.{layer}.self_attn.{leaf}.compressed"
        for layer in (0, 1)
        for leaf in ("q_proj", "v_proj")
    }
    with pytest.raises(
        RunError, match="lora_target: nope is no sparse linear of the model; it has"
    ):
        add_lora(load_sparse(config.model), rank=1, alpha=1, targets=("nope",), masked=False)


@pytest.mark.parametrize("form", ["dense", "packed-fp8", "compressed-tensors"])
def test_other_forms_are_read(
    make: Callable[..., FinetuneConfig], sparse_dirs: dict[str, Path], tmp_path: Path, form: str
) -> None:
    source = tmp_path / "source"
    if form == "dense":
        convert(sparse_dirs["llama"], source, to="dense")
    elif form == "packed-fp8":
        quantize(sparse_dirs["llama"], source, to="fp8")
    else:
        convert(sparse_dirs["llama"], source, to="packed")
        config = json.loads((source / "config.json").read_text())
        sparsity = {
            "format": "sparse-24-bitmask",
            "sparsity_structure": "2:4",
            "targets": ["Linear"],
            "ignore": ["lm_head"],
        }
        quantization = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
        config["quantization_config"] = quantization
        (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "packed", to="packed")
    config_ = make(model=source, steps=2)
    train.run(config_, QUIET)
    assert_same_pattern(tmp_path / "packed", config_.output)


def test_record_is_of_what_was_written(
    make: Callable[..., FinetuneConfig], sparse_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """The base's 8-bit values are gone: what is said of them is said of the base."""
    quantize(sparse_dirs["llama"], tmp_path / "fp8", to="fp8")
    config = make(model=tmp_path / "fp8", steps=1)
    train.run(config, QUIET)
    record = json.loads((config.output / "cast.json").read_text())
    assert "quantization" not in record
    assert record["finetune"]["base_quantization"] == {"format": "packed-fp8"}
    written = json.loads((config.output / "config.json").read_text())
    assert written["quantization_config"]["format"] == "packed"
    plain = make(steps=1, output=tmp_path / "plain")
    train.run(plain, QUIET)
    record = json.loads((plain.output / "cast.json").read_text())
    assert "base_quantization" not in record["finetune"]


def test_export_dense(make: Callable[..., FinetuneConfig]) -> None:
    config = make(steps=2, export="dense")
    train.run(config, QUIET)
    source = tensors_of(config.model)
    kept = unpack(torch.ones_like(source[f"{DOWN}.compressed"]), source[f"{DOWN}.bitmask"]).bool()
    weight = tensors_of(config.output)[f"{DOWN}.weight"]
    assert not weight[~kept].any() and weight[kept].any()


def test_rewrite_refuses_a_broken_pattern(sparse_dirs: dict[str, Path], tmp_path: Path) -> None:
    source = load_sparse(sparse_dirs["llama"])
    weights = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    weights[f"{DOWN}.weight"][~source.masks[DOWN]] = 1e-9
    with pytest.raises(CheckpointError, match=f"{DOWN}.weight: 1024 entries are not zero where"):
        rewrite(source.folder, tmp_path / "out", weights, to="packed", provenance={})
    assert not (tmp_path / "out").exists()


def test_same_seed_same_bits(make: Callable[..., FinetuneConfig], tmp_path: Path) -> None:
    first, second = (make(output=tmp_path / name, lora=True, merge=True) for name in "ab")
    train.run(first, QUIET)
    train.run(second, QUIET)
    one, other = tensors_of(first.output), tensors_of(second.output)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_accumulation_is_one_large_batch(
    make: Callable[..., FinetuneConfig], tmp_path: Path, completions: Path
) -> None:
    """Batches of unequal numbers of labels: a mean of means would differ."""
    runs = [
        make(data=(completions,), output=tmp_path / name, batch_size=size, steps=3,
             gradient_accumulation=8 // size, held_out=0.2)
        for name, size in (("a", 8), ("b", 2))
    ]  # fmt: skip
    for config in runs:
        train.run(config, QUIET)
    losses = [
        json.loads((config.output / "cast.json").read_text())["finetune"]["evaluation"]
        for config in runs
    ]
    assert losses[0]["loss_after"] == pytest.approx(losses[1]["loss_after"], rel=1e-4)


def test_padding_does_not_change_the_loss(
    completions: Path, sparse_dirs: dict[str, Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = load_sparse(sparse_dirs["llama"]).model
    examples = load_examples((completions,), tokenizer, context=64, held_out=0).train
    assert len({len(each.input_ids) for each in examples}) > 1
    together = train.mean_loss(model, examples, batch_size=20)
    assert together == pytest.approx(train.mean_loss(model, examples, batch_size=1), rel=1e-5)
    assert pad(examples)["labels"].shape == (20, max(len(each.labels) for each in examples))


def test_command(make: Callable[..., FinetuneConfig], capsys: pytest.CaptureFixture[str]) -> None:
    config = make()
    flags = ["--model", config.model, "--data", *config.data, "--output", config.output]
    flags += [
        "--steps",
        2,
        "--context",
        32,
        "--batch-size",
        4,
        "--device",
        "cpu",
        "--compute",
        "bf16",
    ]
    assert main([str(flag) for flag in flags]) == 0
    assert f"wrote {config.output} (packed)" in capsys.readouterr().out
    assert_same_pattern(config.model, config.output)
    with pytest.raises(RunError, match=r"output: .* is not an empty folder"):
        main([str(flag) for flag in flags])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--merge"], "merge: is of LoRA; give --lora too"),
        (["--lora-target", "q_proj"], "lora_target: is of LoRA"),
        (["--steps", "1", "--epochs", "1"], "epochs: steps is given too"),
        (["--steps", "0"], "steps: 0 is out of range"),
        (["--lora", "--lora-rank", "0"], "lora_rank: 0 is out of range"),
        (["--lr", "x"], "argument --lr: invalid float value"),
        (["--eval-data", "e.txt", "--held-out", "0.1"], "held_out: eval_data is evaluated on"),
    ],
)
def test_bad_flags(tmp_path: Path, flags: list[str], says: str) -> None:
    with pytest.raises(RunError, match=says):
        main(["--model", "m", "--data", "d.txt", "--output", str(tmp_path / "out"), *flags])


def test_dense_model_is_refused(make: Callable[..., FinetuneConfig], llama_dir: Path) -> None:
    with pytest.raises(RunError, match="has no 2:4 layer; prune it first"):
        train.run(make(model=llama_dir), QUIET)


@pytest.mark.parametrize("place", ["in the model", "under a file"])
def test_an_impossible_output_is_refused_before_training(
    make: Callable[..., FinetuneConfig],
    sparse_dirs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    (tmp_path / "file").touch()
    output, says = {
        "in the model": (sparse_dirs["llama"] / "tuned", "is in the folder that is read"),
        "under a file": (tmp_path / "file/tuned", "output: cannot write .*; choose another"),
    }[place]

    def never(*_: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(train, "FinetuneTrainer", never)
    with pytest.raises(RunError, match=says):
        train.run(make(output=output), QUIET)
    assert not output.exists()


def test_generation_defaults_are_copied_as_they_are(
    make: Callable[..., FinetuneConfig], sparse_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """Those of Llama 2, which transformers reads and refuses to write."""
    folder = shutil.copytree(sparse_dirs["llama"], tmp_path / "model")
    (folder / "generation_config.json").write_text('{"temperature": 0.9}')
    for lora in (False, True):
        config = make(model=folder, steps=1, lora=lora, output=tmp_path / f"lora {lora}")
        train.run(config, QUIET)
    written = (tmp_path / "lora False/generation_config.json").read_text()
    assert written == '{"temperature": 0.9}'


def test_epochs_without_end_are_refused(make: Callable[..., FinetuneConfig]) -> None:
    with pytest.raises(RunError, match=r"the budget is .* steps; give one of at most 1e\+08"):
        train.step_count(make(steps=None, epochs=1e308), 1000)
