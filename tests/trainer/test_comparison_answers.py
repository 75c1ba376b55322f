"""cast-train compare --text --zero-shot: the answers of each checkpoint, each asked once."""

import json

import pytest

from cast_serve.trainer.evaluation import evaluate as evaluation
from cast_serve.trainer.evaluation.evaluate import Request, evaluate
from cast_serve.trainer.main import main

CONTEXT = 32


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "held.out.txt"
    path.write_text("the captain and the whale of the sea and ship " * 12)
    return path


@pytest.fixture
def choices(tmp_path):
    path = tmp_path / "choices.jsonl"
    rows = [
        {"query": f"Question: {n}?\n", "choices": ["sea", "ship", "whale"], "gold": n % 3}
        for n in range(24)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def flags(llama_dir, text_file, text, choices, tmp_path):
    return [
        *("compare", "--model", str(llama_dir), "--data", str(text_file), "--steps", "2"),
        *("--eval-data", str(text), "--context", str(CONTEXT), "--batch-size", "2"),
        *("--device", "cpu", "--output", str(tmp_path / "out"), "--methods", "magnitude,dense"),
        *("--text", str(text), "--zero-shot", str(choices)),
    ]


@pytest.fixture
def evaluated(monkeypatch):
    """The names of the models that were evaluated."""
    names = []

    def counting(request):
        names.append(request.model.name)
        return evaluate(request)

    monkeypatch.setattr(evaluation, "evaluate", counting)
    return names


def answers(model, text, choices):
    request = Request(model=model, text=(text,), zero_shot=(choices,), context=CONTEXT)
    found = evaluate(request)
    return {kind: found[kind] for kind in ("text", "zero_shot")}


def test_answers_are_those_of_evaluate(flags, text, choices, llama_dir, tmp_path, evaluated):
    assert main(flags) == 0
    assert evaluated == ["oneshot-magnitude-seed0", llama_dir.name, "dense-seed0"]
    found = json.loads((tmp_path / "out/results.json").read_text())
    written = (tmp_path / "out/results.md").read_text()
    assert "| perplexity | held.out | choices |" in written
    of = {"untouched": llama_dir}
    of |= {row["checkpoint"]: tmp_path / "out" / row["checkpoint"] for row in found["rows"]}
    given = {row["checkpoint"]: row["answers"] for row in found["rows"]}
    given["untouched"] = found["untouched"]
    perplexities = set()
    for name, model in of.items():
        expected = answers(model, text, choices)
        # Batches of another size round otherwise.
        perplexity = expected["text"][0]["windows"]["perplexity"]
        assert given[name]["text"][0]["windows"]["perplexity"] == pytest.approx(perplexity)
        assert given[name]["zero_shot"] == expected["zero_shot"]
        share = expected["zero_shot"][0]
        cells = f"| {perplexity:.3f} | {share['acc']:.3f} ± {share['acc_stderr']:.3f} |"
        assert cells in written, name
        perplexities.add(f"{perplexity:.3f}")
    assert len(perplexities) == 3


@pytest.mark.slow
def test_each_is_asked_once(flags, choices, tmp_path, evaluated):
    assert main(flags) == 0
    evaluated.clear()
    assert main(flags) == 0
    assert evaluated == []
    # Another question is one for all.
    choices.write_text(choices.read_text().replace("whale", "harpoon"))
    assert main(flags) == 0
    assert sorted(evaluated) == ["dense-seed0", "llama", "oneshot-magnitude-seed0"]
    evaluated.clear()
    without = flags[: flags.index("--text")]
    assert main(without) == 0
    assert evaluated == []
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["untouched"] is None
    assert {row["answers"] for row in found["rows"]} == {None}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--zero-shot", "nothing.jsonl"], "nothing.jsonl"),
        (["--text", "nothing.txt"], "text: nothing.txt is no file"),
        (["--text", "/dev/null"], "text: /dev/null is no file"),
        (["--text", "empty.txt"], "text: empty.txt is empty"),
    ],
)
def test_bad_files_are_refused_before_training(flags, capsys, tmp_path, monkeypatch, given, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    assert main([*flags, *given]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
