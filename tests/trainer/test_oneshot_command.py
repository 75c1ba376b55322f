"""`cast-train prune`: what it writes is what prune_oneshot makes, in every form."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from cast_serve.model_loaders.check import check
from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.trainer.config import Pattern
from cast_serve.trainer.data import read_tokens, to_blocks
from cast_serve.trainer.data_source import DataSource
from cast_serve.trainer.evaluation.checkpoint import load_checkpoint
from cast_serve.trainer.main import main
from cast_serve.trainer.oneshot.prune import prune_oneshot
from cast_serve.trainer.source import load_source


@pytest.fixture
def prune(capsys, tmp_path, text_file):
    """Runs the command on `model`; (exit status, stdout, stderr)."""

    def run(model, method, *flags):
        data = [] if method == "magnitude" or "--data" in flags else ["--data", str(text_file)]
        places = ["--model", str(model), "-o", str(tmp_path / "out"), "--device", "cpu"]
        status = main(["prune", *places, "--method", method, *data, *map(str, flags)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("form", ["packed", "dense"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_two_of_four(llama_dir, gpt2_dir, prune, tmp_path, text_file, method, form, name):
    folder = {"llama": llama_dir, "gpt2": gpt2_dir}[name]
    sample = [] if method == "magnitude" else ["--context", 32, "--samples", 12, "--seed", 3]
    status, out, err = prune(folder, method, "--export", form, *sample)
    assert (status, err) == (0, "")
    source = load_source(folder)
    blocks = to_blocks(
        read_tokens((DataSource(place=str(text_file)),), source.tokenizer), context=32, key="data"
    )
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(3))
    ids = None if method == "magnitude" else blocks.part(order[:12]).stacked()
    prune_oneshot(source.model, method, Pattern.parse("2:4"), ids)
    found = load_checkpoint(tmp_path / "out", dtype=torch.float32)
    assert str(found.form) == form
    expected = source.model.to(source.dtype).float().state_dict()
    for key, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    assert not any(finding.faulty for finding in check(Checkpoint.open(tmp_path / "out")))
    record = json.loads((tmp_path / "out/cast.json").read_text())
    assert record["method"] == f"one-shot {method}"
    assert record["source"] == folder.name
    assert ("calibration" in record) == (method != "magnitude")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert ("12 x 32 tokens" in out) == (method != "magnitude")


def test_text_key_of_calibration_text(prune, tmp_path, llama_dir, text_file):
    flags = ("--context", 32, "--samples", 4)
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "x", "body": text_file.read_text()}))
    status, out, err = prune(llama_dir, "wanda", *flags, "--data", path, "--text-key", "body")
    assert (status, err) == (0, "")
    assert "4 x 32 tokens" in out


def test_other_patterns_are_stock_checkpoints(prune, tmp_path, gpt2_dir):
    status, out, _ = prune(gpt2_dir, "wanda", "--pattern", "4:8", "--context", 16)
    assert status == 0
    assert "(dense)" in out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for layer in model.transformer.h.modules():
        if isinstance(layer, Conv1D):
            assert ((layer.weight.t().reshape(-1, 8) != 0).sum(1) == 4).all()
    record = json.loads((tmp_path / "out/cast.json").read_text())
    assert (record["sparsity"], record["calibration"]["context"]) == ("4:8", 16)


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("wanda", ["--data"], "argument --data: expected at least one argument"),
        ("wanda", ["--data", "absent.txt"], "absent.txt: cannot be read"),
        (
            "wanda",
            ["--data", "a.txt=0.9", "b.txt=0.1"],
            "data: a.txt has a weight; calibration reads all of it",
        ),
        ("wanda", ["--samples", 0], "samples: 0 is out of range; it must be at least 1"),
        ("wanda", ["--seed", 2**64], "is out of range; it must be from 0 to below 2^32"),
        ("wanda", ["--context", 65], "context: 65 is more than the model's 64 positions"),
        ("magnitude", ["--data", "x.txt"], "data: magnitude looks at no text"),
        ("magnitude", ["--text-key", "body"], "text_key: magnitude looks at no text"),
        ("magnitude", ["--samples", 4], "samples: magnitude looks at no text; leave --samples out"),
        ("magnitude", ["--context", 8], "context: magnitude looks at no text"),
        ("magnitude", ["--seed", 1], "seed: magnitude looks at no text"),
        ("magnitude", ["--pattern", "4:2"], "pattern: '4:2' is no N:M pattern"),
        ("obs", [], "argument --method: invalid choice: 'obs'"),
    ],
)
def test_refusals_are_one_line(prune, tmp_path, llama_dir, method, flags, message):
    status, out, err = prune(llama_dir, method, *flags)
    assert (status, out) == (2, "")
    assert err.startswith("cast-train prune: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_needs_text(capsys, llama_dir, tmp_path):
    flags = ["--model", str(llama_dir), "-o", str(tmp_path / "out"), "--method", "sparsegpt"]
    assert main(["prune", *flags]) == 2
    assert "data: sparsegpt needs calibration text; give --data FILE" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_generation_defaults_are_copied_as_they_are(prune, llama_dir, tmp_path, pattern):
    """Those of Llama 2, which transformers reads and refuses to write."""
    folder = shutil.copytree(llama_dir, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"temperature": 0.9}')
    status, _, err = prune(folder, "magnitude", "--pattern", pattern)
    assert (status, err) == (0, "")
    assert (tmp_path / "out/generation_config.json").read_text() == '{"temperature": 0.9}'


def test_nothing_is_written_to_the_folder_of_the_model(prune, llama_dir, tmp_path):
    folder = shutil.copytree(llama_dir, tmp_path / "model")
    held = sorted(folder.iterdir())
    status, _, err = prune(folder, "magnitude", "-o", folder / "pruned")
    assert status == 2
    assert "is in the folder that is read" in err
    assert sorted(folder.iterdir()) == held


def test_output_is_not_overwritten(prune, tmp_path, llama_dir):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    status, _, err = prune(llama_dir, "magnitude")
    assert status == 2
    assert "exists and is not an empty folder" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_full_disk(prune, llama_dir, tmp_path, no_large_files, pattern):
    flags = ("--pattern", pattern, "--dtype", "float32")
    with no_large_files():
        status, _, err = prune(llama_dir, "magnitude", *flags)
    assert status == 2
    assert err.startswith("cast-train prune: error: output: cannot write ")
    assert err.endswith("make room and start it again\n")
    assert list(tmp_path.iterdir()) == []
    assert prune(llama_dir, "magnitude", *flags)[0] == 0
