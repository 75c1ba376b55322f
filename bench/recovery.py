"""A comparison on a real model as a result file: what each method recovers of the dense model.

    python -m bench.recovery COMPARISON...   folders that cast-train compare wrote

Several folders are one comparison made in pieces: the same model and texts, and other methods,
flags, seeds or budgets in each. They may be of several commits: a row has its own. The pieces so
far are results/smollm2-runs/*, where new ones go too.

Writes    smollm2.json (`env`, `setting`, `rows`) and the comparison's two plots, under --out;
          `python -m bench.render` puts the table into docs/cast-in-practice.md, and what came of
          the largest budget into README.md.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cast_serve.bench.arguments import writable_folder
from cast_serve.bench.markdown import replace_between, table
from cast_serve.bench.paths import RESULTS

BEGIN = "<!-- recovery: written by `python -m bench.render` -->"
END = "<!-- end of recovery -->"
NAME = "smollm2"
# Dense, with the data and budget of the others: what their perplexity is divided by. For what was
# not trained that is the model as it came.
CONTROL = "dense"
UNTOUCHED = "untouched, dense"

# Of a row besides its method and settings; each from a file that the comparison asked about.
_TEXT, _CHOICES = "wikitext2_valid_ppl", ("piqa", "arc_easy")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model. Perplexities at the comparison's context; accuracies from 0 to 1.

    `settings` are those of the method alone that are not at their defaults.
    """

    method: str
    tokens: int
    held_out_ppl: float
    wikitext2_valid_ppl: float
    piqa: float
    arc_easy: float
    lr: float | None = None
    lambda_: float | None = None
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None

    @property
    def flags(self) -> str:
        """`settings` as they are given to cast-train."""
        return " ".join(f"--{key.replace('_', '-')} {v}" for key, v in self.settings.items())


def main() -> int:
    """Exit status: 0 written, 2 the folders are no comparison with those questions."""
    parser = argparse.ArgumentParser(prog="python -m bench.recovery", description=__doc__)
    parser.add_argument("comparison", type=Path, nargs="+", help="folder of cast-train compare")
    parser.add_argument("--out", type=writable_folder, default=RESULTS, metavar="DIR")
    given = parser.parse_args()
    try:
        file = collect(given.comparison, given.out)
    except (OSError, ValueError, KeyError) as error:
        print(f"recovery: {error!r}", file=sys.stderr)
        return 2
    print(file)
    return 0


def collect(comparisons: Sequence[Path], out: Path) -> Path:
    """Write the result file and the plots; returns the file.

    Raises:
        KeyError: a comparison was not asked about one of the texts.
        OSError: a folder holds no results.json.
        ValueError: that is no JSON, or the folders are not of one comparison.
    """
    # Optional packages (the extra `train`), and slow to import.
    from cast_serve.trainer.comparison.plots import plot_curves, plot_final
    from cast_serve.trainer.comparison.results import read_results

    pieces = {folder: read_results(folder) for folder in comparisons}
    _require_one_comparison({folder: found for folder, (found, _) in pieces.items()})
    found = pieces[comparisons[0]][0]
    measured = [(row, piece["env"]["commit"]) for piece, rows in pieces.values() for row in rows]
    # What was not trained first, and a method's rows together, whichever folders they are in.
    methods = list(dict.fromkeys(row.method for row, _ in measured))
    measured.sort(key=lambda one: (one[0].tokens, methods.index(one[0].method)))
    rows = [
        {
            "method": UNTOUCHED,
            "tokens": 0,
            "held_out_ppl": measured[0][0].perplexity_dense,
            **_answers(found["untouched"]),
        }
    ]
    rows += [
        {
            "method": row.method,
            "tokens": row.tokens,
            "held_out_ppl": row.perplexity,
            **_answers(row.answers or {"text": [], "zero_shot": []}),
            "lr": row.lr,
            "lambda_": row.lambda_,
            "seed": row.seed,
            "settings": row.settings,
            "commit": commit,
        }
        for row, commit in measured
    ]
    file = out / f"{NAME}.json"
    content = {"env": found["env"], "setting": found["setting"], "rows": rows}
    file.write_text(json.dumps(content, indent=1) + "\n")
    plot_curves([row for row, _ in measured], out / f"{NAME}-perplexity.png")
    plot_final([row for row, _ in measured], out / f"{NAME}-final.png")
    return file


def _require_one_comparison(found: dict[Path, dict[str, Any]]) -> None:
    """Refuse folders whose rows do not belong into one table."""
    (first, wanted), *others = found.items()
    for folder, other in others:
        for key in ("gpu", "torch"):
            if other["env"][key] != wanted["env"][key]:
                values = f"{other['env'][key]!r}, of {first} {wanted['env'][key]!r}"
                raise ValueError(f"not one comparison: {key} of {folder} is {values}")
        if other["setting"] != wanted["setting"]:
            raise ValueError(
                f"not one comparison: model, texts or context of {folder} and {first} differ"
            )
    # A checkpoint's name has the method, rate, lambda and seed in it.
    runs = [
        (row["checkpoint"], row["tokens"], json.dumps(row["settings"], sort_keys=True))
        for other in found.values()
        for row in other["rows"]
    ]
    for run in runs:
        if runs.count(run) > 1:
            raise ValueError(f"not one comparison: {run[0]} is in two of the folders")


def _answers(answers: dict[str, Any]) -> dict[str, float]:
    """The columns that the answers of `cast-train evaluate` give, named after their files."""
    perplexities = {
        f"{_column(one['file'])}_ppl": one["windows"]["perplexity"] for one in answers["text"]
    }
    accuracies = {_column(one["file"]): one["acc"] for one in answers["zero_shot"]}
    found = perplexities | accuracies
    return {name: found[name] for name in (_TEXT, *_CHOICES)}


def _column(file: str) -> str:
    """wikitext2_valid of wikitext2.valid.txt."""
    return Path(file).stem.replace(".", "_")


def load(file: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(file.read_text())["rows"]]


def update_page(page: Path, file: Path) -> None:
    """Put the table of `file` into `page`: runs that differ by their seed alone are one line.

    Raises:
        ValueError: the markers are not there, or no row is of the control.
    """
    groups = _by_seed(file)
    controls = _controls(groups)
    lines = [
        [
            rows[0].method,
            f"`{rows[0].flags}`" if rows[0].flags else "",
            f"{rows[0].tokens / 1e6:.1f} M",
            *("" if value is None else f"{value:.3g}" for value in (rows[0].lr, rows[0].lambda_)),
            str(len(rows)),
            *_found(rows, controls),
        ]
        for rows in groups
    ]
    header = ["method", "flags", "tokens", "lr", "lambda", "seeds", *_columns(file)]
    replace_between(page, BEGIN, END, table(header, lines))


def update_readme(readme: Path, file: Path) -> None:
    """Put what came of the largest budget of `file` into `readme`, below the one-shot methods.

    Raises:
        ValueError: the markers are not there, or no row is of the control.
    """
    groups = _by_seed(file)
    controls = _controls(groups)
    largest = max(rows[0].tokens for rows in groups)
    lines = [
        [rows[0].method, f"{rows[0].tokens / 1e6:.1f} M", *_found(rows, controls)]
        for rows in groups
        if rows[0].tokens in (0, largest)
    ]
    replace_between(readme, BEGIN, END, table(["method", "tokens", *_columns(file)], lines))


def _by_seed(file: Path) -> list[list[Row]]:
    """The rows of `file`; those that differ by their seed alone together.

    Raises:
        ValueError: no row is of the control.
    """
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in load(file):
        key = (row.method, row.tokens, row.lr, row.lambda_, row.flags)
        groups.setdefault(key, []).append(row)
    if not any(rows[0].method == CONTROL for rows in groups.values()):
        raise ValueError(f"{file} has no row of {CONTROL!r}")
    return list(groups.values())


def _columns(file: Path) -> list[str]:
    """The heads of `_found`."""
    evaluated_on = json.loads(file.read_text())["setting"]["evaluated_on"]
    # A text of its own, which nothing was trained on, is no share of the training text.
    held_out = "kept apart" if evaluated_on == "eval_data" else evaluated_on
    return [held_out, "WikiText-2", "x control", "piqa", "arc_easy"]


def _found(rows: list[Row], controls: dict[int, float]) -> list[str]:
    """What was measured of rows that differ by their seed alone."""
    return [
        _over_seeds([row.held_out_ppl for row in rows], "{:.2f}"),
        _over_seeds([row.wikitext2_valid_ppl for row in rows], "{:.2f}"),
        _ratio(_wikitext2(rows), controls.get(rows[0].tokens)),
        _over_seeds([row.piqa for row in rows], "{:.1%}"),
        _over_seeds([row.arc_easy for row in rows], "{:.1%}"),
    ]


def _controls(groups: Iterable[list[Row]]) -> dict[int, float]:
    """What perplexities on WikiText-2 are divided by, by tokens: dense after as many of them.

    Of several rates the best is the control.
    """
    found: dict[int, float] = {}
    for rows in groups:
        if rows[0].method in (UNTOUCHED, CONTROL):
            tokens, value = rows[0].tokens, _wikitext2(rows)
            found[tokens] = min(value, found.get(tokens, value))
    return found


def _wikitext2(rows: list[Row]) -> float:
    return statistics.mean(row.wikitext2_valid_ppl for row in rows)


def _ratio(value: float, control: float | None) -> str:
    return "" if control is None else f"{value / control:.2f}"


def _over_seeds(values: list[float], shown: str) -> str:
    """The mean, and of several the standard deviation of the sample."""
    mean = shown.format(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {shown.format(statistics.stdev(values))}"


if __name__ == "__main__":
    sys.exit(main())
