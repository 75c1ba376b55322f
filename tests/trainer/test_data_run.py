"""Whole runs on mixed sources with attention within documents: plan, output, resumption."""

import dataclasses
import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import BloomConfig, BloomForCausalLM

from cast_serve.trainer import train
from cast_serve.trainer.data_source import DataSource
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.main import main


@pytest.fixture
def small_file(tmp_path):
    path = tmp_path / "small.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"line {n} of few"}) for n in range(20)))
    return path


@pytest.fixture
def mixed(make_config, text_file, small_file):
    """Configuration of a run that repeats the second source several times."""

    def make(**changes):
        data = (
            DataSource(place=str(text_file), weight=1.0),
            DataSource(place=str(small_file), weight=3.0),
        )
        settings = {"data": data, "document_attention": True, "allow_short_travel": True}
        return make_config(**(settings | changes))

    return make


def run(config):
    train.run(config, Console(quiet=True))
    return load_file(config.output / "model.safetensors")


def test_resume_in_the_middle_of_an_epoch_is_bit_exact(mixed, tmp_path):
    config = mixed(steps=8, save_steps=3)
    straight = run(config)
    record = json.loads((config.output / "cast.json").read_text())
    assert record["data"]["files"] == ["words.txt", "small.jsonl"]
    assert record["data"]["shares"] == [0.25, 0.75]
    assert record["document_attention"] is True
    shutil.rmtree(config.run_dir / "checkpoint-8")
    shutil.rmtree(config.output)
    resumed = run(dataclasses.replace(config, resume=True))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_token_cache_changes_nothing(mixed, tmp_path):
    kept = run(mixed(steps=2))
    fresh = run(mixed(steps=2, token_cache=False, output=tmp_path / "fresh"))
    assert all(torch.equal(kept[name], fresh[name]) for name in kept)


def test_document_attention_trains_other_weights(mixed, tmp_path):
    within = run(mixed(steps=2))
    across = run(mixed(steps=2, document_attention=False, output=tmp_path / "across"))
    assert any(not torch.equal(within[name], across[name]) for name in within)


def test_lambda_is_measured_with_document_attention(mixed, tmp_path):
    found = []
    for within in (True, False):
        config = mixed(
            steps=1, lambda_=None, document_attention=within, output=tmp_path / f"{within}"
        )
        run(config)
        record = json.loads((config.run_dir / "run.json").read_text())
        found.append(record["fixed"]["lambda_"])
    assert found[0] != found[1]


def test_plan_shows_the_epochs_of_each_source(llama_dir, text_file, small_file, tmp_path, capsys):
    flags = ["--model", str(llama_dir), "--output", str(tmp_path / "o"), "--context", "32"]
    flags += ["--data", f"{text_file}=1", f"{small_file}=3", "--held-out", "0", "--steps", "20"]
    assert main([*flags, "--dry-run", "--allow-short-travel", "--device", "cpu"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "small.jsonl" in line)
    # Three quarters of 160 sequences are 120.
    tokens = sum(len(f"line {n} of few") + 1 for n in range(20))
    assert tokens // 32 == 9
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "small.jsonl",
        "75.0%",
        "288",
        f"{120 / 9:.3g}",
    ]


def test_model_that_mixes_documents_is_refused(mixed, tokenizer, tmp_path):
    torch.manual_seed(0)
    settings = {"vocab_size": 257, "hidden_size": 32, "n_layer": 2, "n_head": 2}
    model = BloomForCausalLM(BloomConfig(**settings, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    with pytest.raises(RunError, match="document_attention: BloomForCausalLM"):
        run(mixed(model=tmp_path / "bloom"))
