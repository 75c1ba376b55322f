"""cast-train scaling: fit loss against tokens from finished runs, and predict tokens for a target.

Prints the law and the prediction; the last line of stdout is one JSON object, which is also
OUT/results.json. OUT/scaling.png is the plot.
"""

import argparse
import json
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cast_serve.trainer.arguments import Parser
from cast_serve.trainer.errors import RunError

if TYPE_CHECKING:
    from cast_serve.trainer.scaling.predict import Analysis


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="cast-train scaling",
        description="Fit loss against tokens (and size) from finished runs: Hoffmann et al. 2022.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="OUTPUT folder of a finished run, or a .csv or .json table with parameters, tokens, "
        "loss and, if known, dense_loss",
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--target-gap",
        type=float,
        metavar="X",
        help="predict the tokens that bring the loss to the dense model's plus X nats",
    )
    target.add_argument(
        "--target-loss", type=float, metavar="X", help="predict the tokens for this loss"
    )
    parser.add_argument(
        "--dense-loss",
        type=float,
        metavar="X",
        help="loss of the dense model in nats per token; default: what the runs say",
    )
    parser.add_argument(
        "--parameters", type=int, metavar="N", help="predict for this size (default: the largest)"
    )
    parser.add_argument(
        "--confidence", type=float, default=0.9, metavar="X", help="of the intervals (default 0.9)"
    )
    parser.add_argument(
        "--resamples",
        type=int,
        default=1000,
        metavar="N",
        help="bootstrap samples (default 1000, each a fit anew: a tenth of a second or so)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the results"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run `cast-train scaling`; 0, also where the target cannot be reached.

    Raises:
        RunError: anything a user can put right, said in one line.
    """
    options = build_parser().parse_args(arguments)
    _check(options)
    missing = [name for name in ("scipy", "matplotlib") if find_spec(name) is None]
    if missing:
        raise RunError(
            f"fitting a law needs {', '.join(missing)}; install it: pip install 'cast-serve[train]'"
        )
    from rich.console import Console

    from cast_serve.model_loaders.errors import CheckpointError
    from cast_serve.trainer.scaling.plot import write_plot
    from cast_serve.trainer.scaling.predict import analyse, choose_target, to_json
    from cast_serve.trainer.scaling.runs import read_runs

    try:
        runs = read_runs(options.runs)
    except CheckpointError as error:
        raise RunError(str(error)) from error
    target = choose_target(
        runs,
        loss=options.target_loss,
        gap=options.target_gap,
        dense_loss=options.dense_loss,
        parameters=options.parameters,
    )
    analysis = analyse(
        runs,
        target,
        confidence=options.confidence,
        resamples=options.resamples,
        seed=options.seed,
    )
    results = to_json(analysis)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=2) + "\n"
        (options.output / "results.json").write_text(text, encoding="utf-8")
        write_plot(analysis, options.output / "scaling.png")
    except OSError as error:
        raise RunError(f"output: cannot write {options.output}: {error.strerror}") from error
    console = Console(highlight=False, soft_wrap=True)
    for line in describe(analysis):
        console.print(line, markup=False)
    console.print(f"wrote {options.output}/results.json, scaling.png", markup=False)
    # Not print: the console ends in silence where nobody reads any more, as behind `| head`.
    console.out(json.dumps(results), highlight=False)
    return 0


def describe(analysis: "Analysis") -> list[str]:
    """The law, its constants and the prediction, a line each."""
    law, found = analysis.law, analysis.prediction
    lines = [f"warning: {warning}" for warning in analysis.warnings]
    form = "E + A/N^alpha + B/D^beta" if law.A else "E + B/D^beta"
    lines.append(f"L = {form} from {len(analysis.runs)} runs, intervals {analysis.confidence:.0%}")
    for letter, (low, high) in analysis.intervals().items():
        lines.append(f"{letter:>6} {getattr(law, letter):.4g}  [{low:.4g}, {high:.4g}]")
    if found is None:
        return lines
    asked = f"loss {found.target.loss:.4f}"
    if found.target.gap is not None:
        asked += f" ({found.target.gap:+.4g} to the dense model)"
    if math.isfinite(found.tokens):
        ends = [f"{end:.3g}" if math.isfinite(end) else "never" for end in found.interval]
        lines.append(f"{asked} needs {found.tokens:.3g} tokens  [{', '.join(ends)}]")
    else:
        lines.append(
            f"{asked} is not reachable: the law stays above {found.floor:.4f} "
            f"({found.reachable_share:.0%} of the resampled laws reach it)"
        )
    return lines


def _check(options: argparse.Namespace) -> None:
    for key in ("target_gap", "target_loss", "dense_loss"):
        value = getattr(options, key)
        if value is not None and not (math.isfinite(value) and (value > 0 or key == "target_gap")):
            raise RunError(f"{key}: {value} is out of range; it must be a finite loss in nats")
    if not 0 < options.confidence < 1:
        raise RunError(f"confidence: {options.confidence} is not between 0 and 1")
    for key, least in (("resamples", 10), ("seed", 0), ("parameters", 1)):
        value = getattr(options, key)
        if value is not None and value < least:
            raise RunError(f"{key}: {value} is out of range; it must be at least {least}")
    if options.dense_loss is not None and options.target_gap is None:
        raise RunError("dense_loss: is only used with --target-gap")
