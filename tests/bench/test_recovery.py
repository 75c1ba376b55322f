"""A comparison of cast-train as a result file and a table."""

import json
from pathlib import Path

import pytest

from cast_serve.bench.paths import RESULTS
from cast_serve.bench.recovery import BEGIN, END, collect, load, update_page, update_readme


def answers(perplexity: float) -> dict:
    """As cast-train evaluate gives them."""
    return {
        "text": [{"file": "wikitext2.valid.txt", "windows": {"perplexity": perplexity}}],
        "zero_shot": [{"file": "piqa.jsonl", "acc": 0.6}, {"file": "arc_easy.jsonl", "acc": 0.4}],
    }


def row(method: str, perplexity: float, lambda_: float | None = None, **more: object) -> dict:
    """As compare writes it."""
    return {
        "method": method,
        "checkpoint": f"{method}-seed{more.get('seed', 0)}",
        "tokens": 8_400_000,
        "lr": 0.0003,
        "lambda_": lambda_,
        "seed": 0,
        "perplexity_dense": 25.0,
        "perplexity_before_prune": perplexity + 1,
        "perplexity": perplexity + 1,
        "curve": [{"tokens": 0, "perplexity": 25.0, "pruned": 80.0}],
        "answers": answers(perplexity),
        "varied": {},
        "usual": f"{method}-seed0",
        "settings": {},
    } | more


def write(folder: Path, *rows: dict, **env: str) -> Path:
    folder.mkdir()
    found = {
        "env": {"gpu": "NVIDIA H200", "torch": "2.11", "commit": "abc"} | env,
        "setting": {"pattern": "2:4", "evaluated_on": "held-out"},
        "untouched": answers(24.0),
        "rows": rows,
    }
    (folder / "results.json").write_text(json.dumps(found))
    return folder


@pytest.fixture
def comparison(tmp_path):
    return write(tmp_path / "comparison", row("dense", 20.0), row("cast", 25.0, 5e-6))


def table_of(folders: list[Path], tmp_path: Path) -> list[list[str]]:
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    update_page(page, collect(folders, tmp_path))
    lines = page.read_text().splitlines()[3:-1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_rows_and_plots(comparison, tmp_path):
    file = collect([comparison], tmp_path)
    found = json.loads(file.read_text())
    assert found["env"]["gpu"] == "NVIDIA H200"
    assert [one.method for one in load(file)] == ["untouched, dense", "dense", "cast"]
    last = found["rows"][-1]
    assert (last["wikitext2_valid_ppl"], last["held_out_ppl"]) == (25.0, 26.0)
    assert (last["piqa"], last["arc_easy"], last["tokens"]) == (0.6, 0.4, 8_400_000)
    for plot in ("perplexity", "final"):
        assert (tmp_path / f"smollm2-{plot}.png").stat().st_size > 10_000


def test_table(comparison, tmp_path):
    wanted = ["8.4 M", "0.0003", "5e-06", "1", "26.00", "25.00", "1.25", "60.0%", "40.0%"]
    assert table_of([comparison], tmp_path)[-1] == ["cast", "", *wanted]


def test_pieces_with_other_seeds_and_flags(comparison, tmp_path):
    gradient = row("cast", 22.0, 5e-6, settings={"second_moment": "gradient"})
    more = write(tmp_path / "more", row("cast", 27.0, 5e-6, seed=1), gradient)
    *_, mean, other = table_of([comparison, more], tmp_path)
    assert mean[:2] == ["cast", ""]
    assert mean[5:9] == ["2", "27.00 ± 1.41", "26.00 ± 1.41", "1.30"]
    assert other[:2] == ["cast", "`--second-moment gradient`"]
    assert other[7] == "22.00"


def test_the_control_has_as_many_tokens_and_the_best_rate(comparison, tmp_path):
    """Without one nothing is divided; what was not trained is divided by the model as it came."""
    rows = [
        row("cast", 22.0, 5e-6) | {"tokens": 33_600_000, "checkpoint": "cast-long"},
        row("cast", 21.0, 5e-6) | {"tokens": 134_000_000, "checkpoint": "cast-longest"},
        row("dense", 16.0) | {"tokens": 33_600_000},
        row("dense", 19.0) | {"tokens": 33_600_000, "checkpoint": "dense-fast", "lr": 1e-3},
        row("wanda", 96.0) | {"tokens": 0, "checkpoint": "wanda"},
    ]
    table = table_of([comparison, write(tmp_path / "more", *rows)], tmp_path)
    ratios = {(line[0], line[2], line[3]): line[8] for line in table}
    assert ratios["untouched, dense", "0.0 M", ""] == "1.00"
    assert ratios["wanda", "0.0 M", "0.0003"] == "4.00"
    assert ratios["cast", "8.4 M", "0.0003"] == "1.25"
    assert ratios["cast", "33.6 M", "0.0003"] == "1.38"
    assert ratios["dense", "33.6 M", "0.001"] == "1.19"
    assert ratios["cast", "134.0 M", "0.0003"] == ""


def test_readme_has_the_largest_budget_and_the_one_shot_methods(comparison, tmp_path):
    longer = {"tokens": 33_600_000}
    rows = [row("wanda", 96.0) | {"tokens": 0, "checkpoint": "wanda"}]
    rows += [row("dense", 16.0) | longer, row("cast", 24.0, 5e-6) | longer]
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    update_readme(readme, collect([comparison, write(tmp_path / "more", *rows)], tmp_path))
    assert readme.read_text().splitlines()[1:-1] == [
        "| method | tokens | held-out | WikiText-2 | x control | piqa | arc_easy |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| untouched, dense | 0.0 M | 25.00 | 24.00 | 1.00 | 60.0% | 40.0% |",
        "| wanda | 0.0 M | 97.00 | 96.00 | 4.00 | 60.0% | 40.0% |",
        "| dense | 33.6 M | 17.00 | 16.00 | 1.00 | 60.0% | 40.0% |",
        "| cast | 33.6 M | 25.00 | 24.00 | 1.50 | 60.0% | 40.0% |",
    ]


@pytest.mark.parametrize(
    ("evaluated_on", "head"), [("held-out", "held-out"), ("eval_data", "kept apart")]
)
def test_column_says_which_text_it_is_of(comparison, tmp_path, evaluated_on, head):
    file = collect([comparison], tmp_path)
    content = json.loads(file.read_text())
    content["setting"]["evaluated_on"] = evaluated_on
    file.write_text(json.dumps(content))
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    update_page(page, file)
    assert f"| seeds | {head} | WikiText-2 |" in page.read_text()


def test_the_result_file_is_of_the_pieces_beside_it(tmp_path):
    found = collect(sorted((RESULTS / "smollm2-runs").iterdir()), tmp_path)
    assert json.loads(found.read_text()) == json.loads((RESULTS / found.name).read_text())


def test_rows_of_a_method_are_together(comparison, tmp_path):
    """Each with the commit of its piece."""
    others = row("dense", 21.0, seed=1), row("cast", 27.0, 5e-6, seed=1)
    more = write(tmp_path / "more", *others, commit="def")
    untouched, *found = load(collect([comparison, more], tmp_path))
    assert untouched.commit is None
    wanted = [("dense", "abc"), ("dense", "def"), ("cast", "abc"), ("cast", "def")]
    assert [(one.method, one.commit) for one in found] == wanted


@pytest.mark.parametrize(
    ("env", "changes", "message"),
    [
        ({"gpu": "NVIDIA H100"}, {"seed": 1}, "gpu of .*more is 'NVIDIA H100', of .*comparison"),
        ({}, {}, "cast-seed0 is in two of the folders"),
    ],
)
def test_pieces_that_do_not_belong_together(comparison, tmp_path, env, changes, message):
    more = write(tmp_path / "more", row("cast", 27.0, 5e-6, **changes), **env)
    with pytest.raises(ValueError, match=message):
        collect([comparison, more], tmp_path)


def test_pieces_of_other_texts(comparison, tmp_path):
    more = write(tmp_path / "more", row("cast", 27.0, 5e-6, seed=1))
    found = json.loads((more / "results.json").read_text())
    found["setting"]["data"] = ["another.txt"]
    (more / "results.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"model, texts or context of .*more"):
        collect([comparison, more], tmp_path)


def test_a_text_that_was_not_asked_about(comparison, tmp_path):
    found = json.loads((comparison / "results.json").read_text())
    found["rows"][0]["answers"]["text"] = []
    (comparison / "results.json").write_text(json.dumps(found))
    with pytest.raises(KeyError, match="wikitext2_valid_ppl"):
        collect([comparison], tmp_path)


def test_no_control(comparison, tmp_path):
    found = json.loads((comparison / "results.json").read_text())
    found["rows"] = found["rows"][1:]
    (comparison / "results.json").write_text(json.dumps(found))
    file = collect([comparison], tmp_path)
    (tmp_path / "page.md").write_text(f"{BEGIN}\n{END}\n")
    with pytest.raises(ValueError, match="no row of 'dense'"):
        update_page(tmp_path / "page.md", file)
