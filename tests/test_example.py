"""The checkpoint in examples/: whole, small, and as good as its card says."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from cast_serve.model_loaders.check import check
from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.model_loaders.formats import Format
from cast_serve.model_loaders.summary import summarise

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-llama-2of4"


def test_size_and_format():
    summary = summarise(Checkpoint.open(EXAMPLE))
    assert summary.format is Format.PACKED
    assert len(summary.sparse) == 56
    assert 3e6 < summary.dense_bytes / 2 < 8e6
    assert sum(file.stat().st_size for file in EXAMPLE.rglob("*") if file.is_file()) < 12e6


def test_every_group():
    findings = list(check(Checkpoint.open(EXAMPLE)))
    assert not [finding.problem for finding in findings if finding.problem]
    assert sum(finding.groups for finding in findings) == 5_505_024 // 4


def test_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    assert 4096 <= len(tokenizer) <= 8192
    text = "“Call me Ishmael,” she said—naïvely;\n\n\tand 1851 came.  "
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_card_has_the_figures_of_cast_json():
    """The card's training tokens and learning settings are those of the run."""
    import json

    run = json.loads((EXAMPLE / "cast.json").read_text())
    card = (EXAMPLE / "README.md").read_text()
    assert f"{run['tokens'] / 1e6:.1f} M" in card
    config = (EXAMPLE / "recipe" / "cast.yaml").read_text()
    assert re.search(rf"^steps: {run['steps']}$", config, re.MULTILINE)
    assert re.search(rf"^eta: {run['eta']}$", config, re.MULTILINE)


def test_predicts_english(tmp_path):
    """Far below the perplexity of one-shot pruning, on text it has not seen."""
    from transformers import AutoModelForCausalLM

    from cast_serve.model_loaders.convert import convert

    convert(EXAMPLE, tmp_path / "dense", to="dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    text = (
        "The President said that the people of the United States had every reason to be grateful "
        "for the blessings of peace, and that the Congress would in the coming year consider the "
        "means by which the debt of the nation might be reduced."
    )
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss
    assert loss.exp().item() == pytest.approx(20, abs=20)
