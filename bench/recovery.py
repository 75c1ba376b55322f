"""A comparison on a real model as a result file: what each method recovers of the dense model.

    python -m bench.recovery COMPARISON      the folder that cast-train compare wrote

Writes    smollm2.json (`env`, `setting`, `rows`) and the comparison's two plots, under --out;
          `python -m bench.render` puts the table into docs/cast-in-practice.md.
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cast_serve.bench.markdown import replace_between, table
from cast_serve.bench.paths import RESULTS

BEGIN = "<!-- recovery: written by `python -m bench.render` -->"
END = "<!-- end of recovery -->"
NAME = "smollm2"
# Dense, with the data and budget of all others: what their perplexity is divided by.
CONTROL = "dense"
UNTOUCHED = "untouched, dense"
PLOTS = ("perplexity", "final")

# Of a row besides its method and settings; each from a file that the comparison asked about.
_TEXT, _CHOICES = "wikitext2_valid_ppl", ("piqa", "arc_easy")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model. Perplexities at the comparison's context; accuracies from 0 to 1."""

    method: str
    tokens: int
    held_out_ppl: float
    wikitext2_valid_ppl: float
    piqa: float
    arc_easy: float
    lr: float | None = None
    lambda_: float | None = None
    seed: int | None = None


def main() -> int:
    """Exit status: 0 written, 2 the folder is no comparison with those questions."""
    parser = argparse.ArgumentParser(prog="python -m bench.recovery", description=__doc__)
    parser.add_argument("comparison", type=Path, help="output folder of cast-train compare")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    given = parser.parse_args()
    try:
        file = collect(given.comparison, given.out)
    except (OSError, ValueError, KeyError) as error:
        print(f"recovery: {given.comparison}: {error!r}", file=sys.stderr)
        return 2
    print(file)
    return 0


def collect(comparison: Path, out: Path) -> Path:
    """Write the result file and copy the plots; returns the file.

    Raises:
        KeyError: the comparison was not asked about one of the texts.
        OSError, ValueError: the folder holds no results.json.
    """
    found = json.loads((comparison / "results.json").read_text(encoding="utf-8"))
    rows = [
        {
            "method": UNTOUCHED,
            "tokens": 0,
            "held_out_ppl": found["rows"][0]["perplexity_dense"],
            **_answers(found["untouched"]),
        }
    ]
    for row in found["rows"]:
        settings = {key: row[key] for key in ("lr", "lambda_", "seed")}
        rows.append(
            {
                "method": row["method"],
                "tokens": row["tokens"],
                "held_out_ppl": row["perplexity"],
                **_answers(row["answers"]),
                **settings,
            }
        )
    file = out / f"{NAME}.json"
    content = {"env": found["env"], "setting": found["setting"], "rows": rows}
    file.write_text(json.dumps(content, indent=1) + "\n")
    for plot in PLOTS:
        shutil.copy(comparison / f"{plot}.png", out / f"{NAME}-{plot}.png")
    return file


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
    """Put the table of `file` into `page`.

    Raises:
        ValueError: the markers are not there, or no row is of the control.
    """
    rows = load(file)
    control = next((row for row in rows if row.method == CONTROL), None)
    if control is None:
        raise ValueError(f"{file} has no row of {CONTROL!r}")
    lines = [
        [
            row.method,
            f"{row.tokens / 1e6:.1f} M",
            *("" if value is None else f"{value:.2g}" for value in (row.lr, row.lambda_)),
            f"{row.held_out_ppl:.2f}",
            f"{row.wikitext2_valid_ppl:.2f}",
            f"{row.wikitext2_valid_ppl / control.wikitext2_valid_ppl:.2f}",
            f"{row.piqa:.1%}",
            f"{row.arc_easy:.1%}",
        ]
        for row in rows
    ]
    header = ["method", "tokens", "lr", "lambda", "held-out", "WikiText-2", "x control"]
    replace_between(page, BEGIN, END, table([*header, "piqa", "arc_easy"], lines))


if __name__ == "__main__":
    sys.exit(main())
