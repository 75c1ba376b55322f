"""A sweep as a plot and a table: what stands there is what was measured."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest

from cast_serve.bench.paths import RESULTS, ROOT
from cast_serve.bench.sweep_render import load, markers, render, update_page

FILE = RESULTS / "smollm2-sweep.json"
FILES = sorted(RESULTS.glob("*-sweep.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_page_has_every_run(tmp_path, file):
    begin, end = markers(file)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{begin}\n{end}\nafter\n")
    update_page(page, file)
    lines = page.read_text().splitlines()
    runs = load(file).runs
    assert len(lines) == len(runs) + 6
    for run, line in zip(runs, lines[4:], strict=False):
        shown = " | ".join(f"{perplexity:.2f}" for perplexity in run.perplexities.values())
        assert line.endswith(f"| {shown} |")
        assert not run.flags or f"`{run.flags}`" in line


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_page_of_the_docs_is_up_to_date(tmp_path, file):
    page = ROOT / "docs" / "cast-in-practice.md"
    copy = Path(shutil.copy(page, tmp_path))
    update_page(copy, file)
    assert copy.read_text() == page.read_text()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_plot(tmp_path, file):
    pytest.importorskip("matplotlib")
    (plot,) = render(Path(shutil.copy(file, tmp_path)))
    assert plot.stat().st_size > 10_000


def test_a_panel_of_a_run_that_there_is_not(tmp_path):
    found = json.loads(FILE.read_text())
    found["panels"][0]["lines"][0]["points"][0][1] = "another"
    (tmp_path / "a-sweep.json").write_text(json.dumps(found))
    with pytest.raises(KeyError, match="another"):
        load(tmp_path / "a-sweep.json")


@pytest.mark.parametrize(
    ("table", "column"),
    [("held-out", "held_out_ppl"), ("wikitext2", "wikitext2_valid_ppl")],
)
def test_the_tables_of_the_scaling_law_are_of_these_runs(table, column):
    """What docs/scaling-law.md fits: losses in nats, of runs by their name."""
    runs = {run.name: run for run in load(FILE).runs}
    with (RESULTS / f"smollm2-law-{table}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for row in rows:
        run = runs[row["name"]]
        assert int(row["tokens"]) == run.tokens
        assert float(row["loss"]) == pytest.approx(math.log(run.perplexities[column]), abs=1e-6)
