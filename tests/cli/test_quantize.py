"""cast-model quantize on a model that transformers runs: sizes, perplexity, refusals."""

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from cast_serve.cli.model import app
from cast_serve.model_loaders.prune import prune


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2:4 Llama with a tokenizer of one token a byte."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0} | {letter: place for place, letter in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        # Far from zero, so that rounding changes the loss.
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "dense")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    wrapped.save_pretrained(folder / "dense")
    prune(folder / "dense", folder / "pruned")
    return folder / "pruned"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("the whale and the sea " * 40)
    return path


def cast_model(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(each) for each in arguments])


@pytest.mark.parametrize("to", ["fp8", "int8"])
def test_quantize_measures_both(pruned: Path, text: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    result = cast_model("quantize", pruned, f"--{to}", "-o", out, "--text", text, "--context", 32)
    assert result.exit_code == 0, result.output
    record = json.loads((out / "cast.json").read_text())["quantization"]
    before, after = record["before"], record["after"]
    assert before["tokens"] == 880 // 32 * 32 and before["text"] == ["words.txt"]
    assert f"perplexity {before['perplexity']:.3f} -> {after['perplexity']:.3f}" in result.stdout
    assert f"{out}: packed-{to}, 14 sparse and 1 dense linears, " in result.stdout
    # Rounding changes the model, and by little.
    assert before["perplexity"] != after["perplexity"]
    assert math.isclose(before["perplexity"], after["perplexity"], rel_tol=0.2)
    assert str(text.parent) not in json.dumps(record)
    # The same text on what it unpacks to: `after` is of the files that were written.
    assert cast_model("unpack", out, "-o", tmp_path / "dense").exit_code == 0
    from cast_serve.cli.perplexity import measure_on

    again = measure_on((text,), 32)(tmp_path / "dense")
    assert again["perplexity"] == pytest.approx(after["perplexity"], rel=1e-6)


def test_text_key(pruned: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"body": "the whale and the sea " * 40}))
    flags = ("--text", path, "--context", 32)
    result = cast_model("quantize", pruned, "--fp8", "-o", tmp_path / "a", *flags)
    assert result.exit_code == 1 and 'no object with a string under "text"' in result.stderr
    result = cast_model(
        "quantize", pruned, "--fp8", "-o", tmp_path / "a", *flags, "--text-key", "body"
    )
    assert result.exit_code == 0, result.output
    assert "(864 tokens)" in result.stdout


def test_inspect_and_check(pruned: Path, tmp_path: Path) -> None:
    assert cast_model("quantize", pruned, "--int8", "-o", tmp_path / "out").exit_code == 0
    assert "packed-int8, float32" in cast_model("inspect", tmp_path / "out").stdout
    assert "(packed-int8)" in cast_model("check", tmp_path / "out").stdout


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "give one of --fp8 and --int8"),
        (["--fp8", "--int8"], "give one of --fp8 and --int8"),
        (["--fp8", "--context", "8"], "--context and --text-key are of --text; give that too"),
        (["--fp8", "--text-key", "body"], "--context and --text-key are of --text; give that too"),
    ],
)
def test_bad_flags(pruned: Path, tmp_path: Path, flags: list[str], says: str) -> None:
    result = cast_model("quantize", pruned, "-o", tmp_path / "out", *flags)
    assert result.exit_code == 2 and says in result.stderr


def test_a_text_of_the_hub_that_is_none_is_one_line(pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cast_model("quantize", pruned, "--fp8", "-o", out, "--text", "hub:a:b:c")
    assert result.exit_code == 1 and "'hub:a:b:c' names no data set; write" in result.stderr
    assert not out.exists()


def test_missing_text_is_one_line(pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cast_model("quantize", pruned, "--fp8", "-o", out, "--text", tmp_path / "no.txt")
    assert result.exit_code == 1 and "no.txt: cannot be read" in result.stderr
    assert not out.exists()
