"""A sweep as a plot and a table: what stands there is what was measured."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest

from cast_serve.bench.paths import RESULTS, ROOT
from cast_serve.bench.sweep_render import BEGIN, END, load, render, update_page

FILE = RESULTS / "smollm2-sweep.json"


def test_the_page_has_every_run(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    update_page(page, FILE)
    lines = page.read_text().splitlines()
    runs = load(FILE).runs
    assert len(lines) == len(runs) + 6
    for run, line in zip(runs, lines[4:], strict=False):
        assert f"| {run.held_out_ppl:.2f} | {run.wikitext2_valid_ppl:.2f} |" in line
        assert f"`{run.flags}`" in line


def test_the_page_of_the_docs_is_up_to_date(tmp_path):
    page = ROOT / "docs" / "cast-in-practice.md"
    copy = Path(shutil.copy(page, tmp_path))
    update_page(copy, FILE)
    assert copy.read_text() == page.read_text()


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    (plot,) = render(Path(shutil.copy(FILE, tmp_path)))
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
        assert float(row["loss"]) == pytest.approx(math.log(getattr(run, column)), abs=1e-6)
