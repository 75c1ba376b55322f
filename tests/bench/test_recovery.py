"""A comparison of cast-train as a result file and a table."""

import json

import pytest

from cast_serve.bench.recovery import BEGIN, END, collect, load, update_page


def answers(perplexity: float) -> dict:
    """As cast-train evaluate gives them."""
    return {
        "text": [{"file": "wikitext2.valid.txt", "windows": {"perplexity": perplexity}}],
        "zero_shot": [{"file": "piqa.jsonl", "acc": 0.6}, {"file": "arc_easy.jsonl", "acc": 0.4}],
    }


def row(method: str, perplexity: float, lambda_: float | None = None) -> dict:
    return {
        "method": method,
        "tokens": 8_400_000,
        "lr": 0.0003,
        "lambda_": lambda_,
        "seed": 0,
        "perplexity_dense": 25.0,
        "perplexity": perplexity + 1,
        "answers": answers(perplexity),
    }


@pytest.fixture
def comparison(tmp_path):
    folder = tmp_path / "comparison"
    folder.mkdir()
    found = {
        "env": {"gpu": "NVIDIA H200"},
        "setting": {"pattern": "2:4"},
        "untouched": answers(24.0),
        "rows": [row("dense", 20.0), row("cast", 25.0, 5e-6)],
    }
    (folder / "results.json").write_text(json.dumps(found))
    for plot in ("perplexity", "final"):
        (folder / f"{plot}.png").write_bytes(b"a plot")
    return folder


def test_rows_and_plots(comparison, tmp_path):
    file = collect(comparison, tmp_path)
    found = json.loads(file.read_text())
    assert found["env"] == {"gpu": "NVIDIA H200"}
    assert [one.method for one in load(file)] == ["untouched, dense", "dense", "cast"]
    last = found["rows"][-1]
    assert (last["wikitext2_valid_ppl"], last["held_out_ppl"]) == (25.0, 26.0)
    assert (last["piqa"], last["arc_easy"], last["tokens"]) == (0.6, 0.4, 8_400_000)
    assert (tmp_path / "smollm2-final.png").read_bytes() == b"a plot"


def test_table(comparison, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    update_page(page, collect(comparison, tmp_path))
    *_, last, _ = page.read_text().splitlines()
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    assert cells == ["cast", "8.4 M", "0.0003", "5e-06", "26.00", "25.00", "1.25", "60.0%", "40.0%"]


def test_a_text_that_was_not_asked_about(comparison, tmp_path):
    found = json.loads((comparison / "results.json").read_text())
    found["rows"][0]["answers"]["text"] = []
    (comparison / "results.json").write_text(json.dumps(found))
    with pytest.raises(KeyError, match="wikitext2_valid_ppl"):
        collect(comparison, tmp_path)


def test_no_control(comparison, tmp_path):
    found = json.loads((comparison / "results.json").read_text())
    found["rows"] = found["rows"][1:]
    (comparison / "results.json").write_text(json.dumps(found))
    file = collect(comparison, tmp_path)
    (tmp_path / "page.md").write_text(f"{BEGIN}\n{END}\n")
    with pytest.raises(ValueError, match="no row of 'dense'"):
        update_page(tmp_path / "page.md", file)
