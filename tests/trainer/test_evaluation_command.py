"""`cast-train evaluate` as it is called: tables, one JSON line, refusals."""

import json
from pathlib import Path

import pytest
import torch

from cast_serve.trainer.evaluation.checkpoint import load_checkpoint
from cast_serve.trainer.evaluation.evaluate import finite
from cast_serve.trainer.evaluation.text import token_stream
from cast_serve.trainer.main import main


@pytest.fixture
def evaluate(llama_dir, capsys):
    """(exit status, stdout, stderr) of the command on the tiny Llama."""

    def run(*flags: object) -> tuple[int, str, str]:
        status = main(["evaluate", str(llama_dir), "--device", "cpu", *map(str, flags)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def items_file(tmp_path) -> Path:
    path = tmp_path / "items.jsonl"
    rows = [{"query": f"Q{i}?", "choices": ["yes", "no"], "gold": i % 2} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_everything_at_once(evaluate, llama_dir, text_file, items_file, tmp_path):
    status, out, err = evaluate(
        *("--text", text_file, "--context", 64, "--zero-shot", items_file, "--limit", 5),
        *("--json", tmp_path / "out.json"),
    )
    assert (status, err) == (0, "")
    line = out.splitlines()[-1]
    assert (tmp_path / "out.json").read_text() == line + "\n"
    result = json.loads(line)
    loaded = load_checkpoint(llama_dir, dtype=torch.float32)
    tokens = token_stream(text_file, loaded.tokenizer, join="raw")
    text = result["text"][0]
    assert (text["tokens"], text["context"]) == (len(tokens), 64)
    windows = tokens[: len(tokens) // 64 * 64].view(-1, 64).long()
    with torch.no_grad():
        loss = loaded.model(input_ids=windows, labels=windows).loss
    assert text["windows"]["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)
    assert text["windows"]["scored_tokens"] == len(tokens) // 64 * 63
    assert text["strided"]["stride"] == 32
    assert text["strided"]["scored_tokens"] == len(tokens) - 1
    assert result["zero_shot"][0]["items"] == 5
    assert result["model"] == "llama"
    assert f"{text['windows']['perplexity']:.3f}" in out
    assert str(llama_dir.parent) not in line


def test_text_key_of_documents(evaluate, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"body": "words " * 20}))
    flags = ("--text", path, "--context", 32)
    status, out, _ = evaluate(*flags, "--join", "documents", "--text-key", "body")
    assert status == 0
    assert json.loads(out.splitlines()[-1])["text"][0]["tokens"] == 6 * 20 + 1
    # One file without keys beside one that has them.
    (tmp_path / "plain.txt").write_text("words " * 20)
    both = ("--text", tmp_path / "plain.txt", path, *flags[2:], "--join", "documents")
    assert evaluate(*both, "--text-key", "body")[0] == 0
    alone = (*both[:2], *both[3:])
    status, _, err = evaluate(*alone, "--text-key", "body")
    assert (status, "plain.txt has no keys, and no other file given has" in err) == (2, True)
    status, _, err = evaluate(*flags, "--text-key", "body")
    assert (status, "text_key: a file that is read as one text" in err) == (2, True)


def test_bf16_is_another_number_nearby(evaluate, text_file):
    found = []
    for compute in ("fp32", "bf16"):
        _, out, _ = evaluate("--text", text_file, "--compute", compute)
        found.append(json.loads(out.splitlines()[-1])["text"][0]["windows"]["loss"])
    assert found[0] != found[1]
    assert found[0] == pytest.approx(found[1], rel=1e-2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to evaluate on; give --text, --zero-shot or --tasks"),
        (["--text", "TEXT", "--context", "65"], "context: 65 is more than the model's 64"),
        (["--text", "TEXT", "--context", "1"], "context: 1 is out of range; it must be at least 2"),
        (["--text", "TEXT", "--context", "32", "--stride", "33"], "stride: 33 would leave out"),
        (["--text", "TINY", "--context", "32"], "has 9 tokens, less than one window of 32"),
        (["--text", "TEXT", "--include-path", "absent"], "include_path: absent is no folder"),
        (["--zero-shot", "x.jsonl", "--context", "8"], "context: is of --text; give that too"),
        (["--tasks", "arc", "--stride", "8"], "stride: is of --text; give that too"),
        (["--zero-shot", "x.jsonl", "--join", "documents"], "join: is of --text; give that too"),
        (["--text", "TEXT", "--between", " "], "between: is of --zero-shot; give that too"),
        (["--text", "TEXT", "--include-path", "."], "include_path: is of --tasks; give that too"),
        (["--text", "TEXT", "--limit", "5"], "limit: is of --zero-shot or --tasks; give that too"),
        (["--text", "TEXT", "--json", "absent/x.json"], "json: absent is no folder"),
        (["--text", "TEXT", "--compute", "fp8"], "argument --compute: invalid choice: 'fp8'"),
    ],
)
def test_refusals_are_one_line(evaluate, text_file, tmp_path, flags, message):
    (tmp_path / "tiny.txt").write_text("too short")
    places = {"TEXT": text_file, "TINY": tmp_path / "tiny.txt"}
    status, out, err = evaluate(*(places.get(flag, flag) for flag in flags))
    assert (status, out) == (2, "")
    assert err.startswith("cast-train evaluate: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_what_is_missing_is_said_before_the_model_is_loaded(evaluate, text_file, monkeypatch):
    def load(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("cast_serve.trainer.evaluation.evaluate.load_checkpoint", load)
    missing = text_file.with_name("missing.txt")
    status, _, err = evaluate("--text", text_file, missing)
    assert (status, len(err.splitlines())) == (2, 1)
    assert f"text: {missing}: cannot be read: No such file" in err


def test_no_checkpoint(capsys, text_file, tmp_path):
    (tmp_path / "empty").mkdir()
    assert main(["evaluate", str(tmp_path / "empty"), "--text", str(text_file)]) == 2
    assert "holds no config.json" in capsys.readouterr().err


def test_numbers_that_json_lacks_are_null():
    value = {"a": [float("inf"), 1.0], "b": {"c": float("nan"), "d": "x", "e": 3}}
    assert finite(value) == {"a": [None, 1.0], "b": {"c": None, "d": "x", "e": 3}}
